// Device code of the kernels of which a block has 32 V channels and a share of the positions: a warp's threads stand
// side by side on the channels, V of them each, and its warps take turns at the positions.
#pragma once

#include "concat_fuse.cuh"

namespace fastfuse {

// What a thread of such a block works on.
template <typename T, int V>
struct Place {
  const Source* source;
  const Module* module;
  int own, channel;     // this thread's first channel in its map, in its module
  bool present;
  int begin, end;       // of the block's share of the positions

  __device__ explicit Place(const Call& call) {
    int s = 0;
    while (s + 1 < call.maps && call.source[s + 1].first_tile <= static_cast<int>(blockIdx.y)) ++s;
    source = &call.source[s];
    module = &call.module[source->module];
    own = (static_cast<int>(blockIdx.y) - source->first_tile) * 32 * V + static_cast<int>(threadIdx.x % 32) * V;
    channel = source->inner + own;
    present = own < source->map.channels;
    begin = static_cast<int>(blockIdx.x) * call.chunk;
    end = min(begin + call.chunk, call.batch * spatial(call));
  }
  // Of the channel among all of the call, for tables of partial results.
  __device__ int column() const { return source->first + own; }
};

template <typename T, int V>
__device__ inline Pack<T, V>* at(const Map& map, int channel, int b, int n) {
  return reinterpret_cast<Pack<T, V>*>(
      static_cast<T*>(map.data) + b * map.sample + n * map.position + channel * map.channel);
}

// The stencil on V channels; `taps` [TAPS][V].
template <typename T, int V>
__device__ inline void filter(
    const Call& call, const Map& map, int channel, const float (*taps)[V], int b, int n, float* total) {
  const int row = n / call.width, column = n % call.width;
#pragma unroll
  for (int v = 0; v < V; ++v) total[v] = 0;
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
    if (!reaches(call, row, column, i)) continue;
    const auto pack = *at<T, V>(map, channel, b, n + step(call, i));
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] += taps[i][v] * static_cast<float>(pack.values[v]);
  }
}

template <int V>
__device__ inline void load_taps(const Module& module, int channel, float (*taps)[V], bool turned) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float own[TAPS];
    load_taps(module, channel + v, own);
#pragma unroll
    for (int i = 0; i < TAPS; ++i) taps[i][v] = own[turned ? TAPS - 1 - i : i];
  }
}

}  // namespace fastfuse
