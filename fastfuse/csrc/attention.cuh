// What the operators on attention maps share: the attention of a sample, and values of a map times a factor per position.
#pragma once

#include "common.cuh"

namespace fastfuse {

// Maps or pairs of a launch, at most: their descriptions are kernel parameters.
constexpr int MOST = 32;
// Positions of one block of the backward.
constexpr int CHUNK = 256;
constexpr int WIDEST = 8;

// A map whose gradient is wanted, in a backward launch; `start` is that of its attention maps among all.
struct Item {
  Map map, gradient;
  int64_t start;
  int32_t batch, positions, pair, side;
};
struct Items {
  Item item[MOST];
};

struct Batches {
  int32_t batch[MOST];
};

// One block per pair adds its samples [row] in a fixed order, or takes their mean.
__device__ __forceinline__ void add_samples(
    const Batches& batches, const float* per_sample, int64_t row, float* losses, bool mean) {
  __shared__ float sums[WARPS];
  const int batch = batches.batch[blockIdx.x];
  float total = 0;
  for (int b = threadIdx.x; b < batch; b += THREADS) total += per_sample[blockIdx.x * row + b];
  total = block_sum(total, sums);
  if (threadIdx.x == 0) losses[blockIdx.x] = mean ? total / static_cast<float>(batch) : total;
}

// Where sums of squares over channels go: divided, and added to what is there if `more`.
struct Attention {
  float* values;
  float divisor;
  bool more;
  __device__ void put(int n, float squares) const { values[n] = (more ? values[n] : 0.0f) + squares / divisor; }
};

// Attention of one sample whose positions follow each other in memory, or of any map if V is 1: threads beside each
// other take V positions each, groups of them share the channels, and `scratch` [THREADS V] brings the groups together.
template <typename T, int V>
__device__ __forceinline__ void attention_by_rows(const Map& map, const T* x, int positions, Attention to, float* scratch) {
  const int thread = static_cast<int>(threadIdx.x), groups = positions / V;
  int width = 1;
  while (width < groups && width < THREADS) width *= 2;
  const int lanes = THREADS / width, column = thread % width;
  for (int first = 0; first < groups; first += width) {
    float squares[V] = {};
    if (first + column < groups) {
      const T* start = x + (first + column) * V * map.position;
#pragma unroll 4
      for (int c = thread / width; c < map.channels; c += lanes) {
        const auto pack = *reinterpret_cast<const Pack<T, V>*>(start + c * map.channel);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const auto value = static_cast<float>(pack.values[v]);
          squares[v] += value * value;
        }
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) scratch[thread * V + v] = squares[v];
    __syncthreads();
    for (int i = thread; i < width * V && first * V + i < positions; i += THREADS) {
      float total = 0;
      for (int lane = 0; lane < lanes; ++lane) total += scratch[lane * width * V + i];
      to.put(first * V + i, total);
    }
    __syncthreads();
  }
}

// The same where channels follow each other: up to 32 threads share a position.
template <typename T, int V>
__device__ __forceinline__ void attention_by_columns(const Map& map, const T* x, int positions, Attention to) {
  const int thread = static_cast<int>(threadIdx.x), groups = map.channels / V;
  int width = 1;
  while (width < groups && width < 32) width *= 2;
  for (int first = 0; first < positions; first += THREADS / width) {
    const int n = first + thread / width;
    float squares = 0;
    if (n < positions) {
#pragma unroll 4
      for (int group = thread % width; group < groups; group += width) {
        const auto pack = *reinterpret_cast<const Pack<T, V>*>(x + n * map.position + group * V);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const auto value = static_cast<float>(pack.values[v]);
          squares += value * value;
        }
      }
    }
    for (int lane = width / 2; lane > 0; lane /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, lane);
    if (n < positions && thread % width == 0) to.put(n, squares);
  }
}

// Attention of one sample of a feature map, or the ready one as it is.
__device__ __forceinline__ void attention_of(const Map& map, int64_t sample, int positions, Attention to, float* scratch) {
  with_type(map.type, [&](auto kind) {
    using T = decltype(kind);
    constexpr int V = 16 / sizeof(T);
    const T* x = static_cast<const T*>(map.data) + sample * map.sample;
    if (map.channels == READY) {
      for (int n = threadIdx.x; n < positions; n += THREADS) to.values[n] = static_cast<float>(x[n * map.position]);
    } else if (map.last && map.wide) {
      attention_by_columns<T, V>(map, x, positions, to);
    } else if (map.last) {
      attention_by_columns<T, 1>(map, x, positions, to);
    } else if (map.wide) {
      attention_by_rows<T, V>(map, x, positions, to, scratch);
    } else {
      attention_by_rows<T, 1>(map, x, positions, to, scratch);
    }
  });
}

// Calls `function` with each value of a sample of a map, its channels at `count` positions from `first` on, and with the
// position less `first`; writes what it returns to the same place of another map.
template <typename T, int V, typename F>
__device__ __forceinline__ void transform(
    const Map& from, const Map& to, int64_t sample, int first, int count, F&& function) {
  const int thread = static_cast<int>(threadIdx.x);
  const T* x = static_cast<const T*>(from.data) + sample * from.sample + first * from.position;
  T* out = static_cast<T*>(to.data) + sample * to.sample + first * to.position;
  // Elements one after another along the contiguous axis: V positions of a channel, or V channels of a position.
  const int inner = from.last ? from.channels / V : count / V, outer = from.last ? count : from.channels;
  int width = 1;
  while (width < inner && width < THREADS) width *= 2;
  for (int i = thread % width; i < inner; i += width) {
#pragma unroll 2
    for (int o = thread / width; o < outer; o += THREADS / width) {
      const int n = from.last ? o : i * V;
      const int64_t c = from.last ? i * V : o;
      const auto pack = *reinterpret_cast<const Pack<T, V>*>(x + n * from.position + c * from.channel);
      Pack<T, V> made;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        made.values[v] = T(function(static_cast<float>(pack.values[v]), from.last ? n : n + v));
      }
      *reinterpret_cast<Pack<T, V>*>(out + n * to.position + c * to.channel) = made;
    }
  }
}

// The same for a map's element type and layout.
template <typename F>
__device__ __forceinline__ void transform_map(
    const Map& from, const Map& to, int64_t sample, int first, int count, F&& function) {
  with_type(from.type, [&](auto kind) {
    using T = decltype(kind);
    if (from.wide && to.wide && from.last == to.last) {
      transform<T, 16 / sizeof(T)>(from, to, sample, first, count, function);
    } else {
      transform<T, 1>(from, to, sample, first, count, function);
    }
  });
}

// The gradient of CHUNK positions: a factor for each, times the feature if the map is not a ready one.
__device__ __forceinline__ void scale_map(const Item& item, int64_t sample, int first, const float* factor) {
  const int count = min(CHUNK, item.positions - first);
  if (item.map.channels != READY) {
    return transform_map(item.map, item.gradient, sample, first, count, [&](float x, int i) { return x * factor[i]; });
  }
  with_type(item.map.type, [&](auto kind) {
    using T = decltype(kind);
    T* out = static_cast<T*>(item.gradient.data) + sample * item.gradient.sample;
    for (int i = threadIdx.x; i < count; i += THREADS) out[(first + i) * item.gradient.position] = T(factor[i]);
  });
}

inline Item item_of(const Tensor& x, const Tensor& gradient) {
  return {map_of(x), map_of(gradient), 0, static_cast<int32_t>(x.size(0)), static_cast<int32_t>(positions_of(x)), 0, 0};
}

}  // namespace fastfuse
