// Device code of the kernels of which one block has a channel.
#pragma once

#include "concat_fuse.cuh"

namespace fastfuse {

// All values of a channel, in shared memory or where they lie.
template <typename T, bool STAGED>
struct Plane {
  T* data;
  int64_t sample, position;
  float* staged;

  __device__ Plane(const Map& map, int channel, float* memory)
      : data(static_cast<T*>(map.data) + channel * map.channel),
        sample(map.sample),
        position(map.position),
        staged(memory) {}
  __device__ float load(int b, int n) const { return static_cast<float>(data[b * sample + n * position]); }
  __device__ void store(int b, int n, float value) const { data[b * sample + n * position] = T(value); }
  __device__ float get(const Call& call, int b, int n) const {
    return STAGED ? staged[b * spatial(call) + n] : load(b, n);
  }
  __device__ void put(const Call& call, int b, int n, float value) const {
    if (STAGED) {
      staged[b * spatial(call) + n] = value;
    } else {
      store(b, n, value);
    }
  }
};

// Calls `function` with sample and position of each of this thread's values.
template <typename F>
__device__ inline void for_each(const Call& call, F&& function) {
  const int own = spatial(call), count = call.batch * own;
  for (int p = threadIdx.x; p < count; p += THREADS) function(p / own, p % own);
}

template <typename T, bool STAGED>
__device__ inline float filtered(const Call& call, const Plane<T, STAGED>& x, const float* taps, int b, int n) {
  const int row = n / call.width, column = n % call.width;
  float total = 0;
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
    if (reaches(call, row, column, i)) total += taps[i] * x.get(call, b, n + step(call, i));
  }
  return total;
}

__device__ inline const Source& source_of(const Call& call, int channel) {
  int s = 0;
  while (s + 1 < call.maps && call.source[s + 1].first <= channel) ++s;
  return call.source[s];
}

}  // namespace fastfuse
