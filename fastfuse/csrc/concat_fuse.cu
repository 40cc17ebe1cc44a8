// The first part of concat_fuse: depthwise 3x3, batch norm, ReLU, of all maps of all modules of a call.
//
// Maps in which a channel is contiguous: one block per channel holds the channel's whole batch in shared memory, so that
// stencil, statistics, normalisation and ReLU are one launch, and so is their backward. Where it does not fit, the block
// reads the channel again from memory. Channels-last maps: blocks of 32 or 64 channels and a share of the positions;
// every block merges the moments of all shares in the same order.
// See fastfuse/kernels/concat_fuse/README.md.
#include "common.cuh"

namespace fastfuse {
namespace {

constexpr int MOST_MAPS = 20, MOST_MODULES = 8;
constexpr int TAPS = 9;
// Bytes of a block's shared memory that its channel may take: what an A100 has, less 3 KiB for sums.
#ifndef FASTFUSE_MOST_SHARED
#define FASTFUSE_MOST_SHARED (160 * 1024)
#endif
// The positions are shared by at most so many blocks, of at least so many positions each.
constexpr int64_t SHARES = 32, LEAST = 64;

// One map: its channels stand from `inner` on in its module, from `first` on among all channels of the call.
struct Source {
  Map map, gradient;
  int32_t module, inner, first, first_tile;
};

struct Module {
  Vector taps, weight, bias, mean, var;  // mean and var: the running ones in a forward, those used in a backward
  Vector of_taps, of_weight, of_bias;    // where gradients go, or nowhere
  Map hidden;                            // the ReLU's output, in a backward its gradient
  float* statistics;                     // [2, C], of the batch
  int64_t tap_c, tap_i, tap_j;
  int32_t channels;
  float momentum, eps;
};

struct Call {
  Source source[MOST_MAPS];
  Module module[MOST_MODULES];
  int32_t maps, batch, height, width, channels, tiles;
  int32_t chunk, shares;  // positions of a share, and how many shares there are
  bool training;
};

__device__ int spatial(const Call& call) { return call.height * call.width; }

// The weights of a channel of a module.
__device__ void load_taps(const Module& module, int channel, float* taps) {
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
    taps[i] = module.taps.get(channel * module.tap_c + i / 3 * module.tap_i + i % 3 * module.tap_j);
  }
}

// What normalises a channel.
struct Standard {
  float mean, inverse, weight, bias;
  __device__ Standard(const Module& module, int channel, float mean, float var)
      : mean(mean),
        inverse(1.0f / sqrtf(var + module.eps)),
        weight(module.weight.get(channel)),
        bias(module.bias.get(channel)) {}
  __device__ float of(float z) const { return (z - mean) * inverse; }
  // NaN passes through the ReLU, as in torch.
  __device__ float rectified(float x) const {
    const float y = x * weight + bias;
    return y < 0 ? 0.0f : y;
  }
};

// The statistics of a batch: kept for the backward, and the running ones as torch updates them.
__device__ void keep_statistics(const Module& module, int channel, const Moments& all) {
  const float momentum = module.momentum, var = all.squares / all.count;
  module.statistics[channel] = all.mean;
  module.statistics[module.channels + channel] = var;
  module.mean.put(channel, (1 - momentum) * module.mean.get(channel) + momentum * all.mean);
  module.var.put(channel, (1 - momentum) * module.var.get(channel) + momentum * (all.squares / (all.count - 1)));
}

// Whether the neighbour at tap i of a position lies in the map, and how many positions away it is.
__device__ bool reaches(const Call& call, int row, int column, int i) {
  const int r = row + i / 3 - 1, c = column + i % 3 - 1;
  return r >= 0 && r < call.height && c >= 0 && c < call.width;
}
__device__ int step(const Call& call, int i) { return (i / 3 - 1) * call.width + i % 3 - 1; }

// ---------------------------------------------------------------------------------------------------------------------
// One block per channel.

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
__device__ void for_each(const Call& call, F&& function) {
  const int own = spatial(call), count = call.batch * own;
  for (int p = threadIdx.x; p < count; p += THREADS) function(p / own, p % own);
}

template <typename T, bool STAGED>
__device__ float filtered(const Call& call, const Plane<T, STAGED>& x, const float* taps, int b, int n) {
  const int row = n / call.width, column = n % call.width;
  float total = 0;
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
    if (reaches(call, row, column, i)) total += taps[i] * x.get(call, b, n + step(call, i));
  }
  return total;
}

__device__ const Source& source_of(const Call& call, int channel) {
  int s = 0;
  while (s + 1 < call.maps && call.source[s + 1].first <= channel) ++s;
  return call.source[s];
}

// The moments of all threads' values, merged in a fixed order; the same in every thread.
__device__ Moments block_merge(Moments own, Moments* scratch) {
  for (int lane = 1; lane < 32; lane *= 2) {
    Moments other;
    other.count = __shfl_xor_sync(0xffffffffu, own.count, lane);
    other.mean = __shfl_xor_sync(0xffffffffu, own.mean, lane);
    other.squares = __shfl_xor_sync(0xffffffffu, own.squares, lane);
    own = threadIdx.x & lane ? merge(other, own) : merge(own, other);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  Moments all = scratch[0];
  for (int warp = 1; warp < WARPS; ++warp) all = merge(all, scratch[warp]);
  return all;
}

template <typename T, bool STAGED>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_fwd_channel_kernel(const __grid_constant__ Call call) {
  __shared__ Moments scratch[WARPS];
  const Source& source = source_of(call, blockIdx.x);
  const Module& module = call.module[source.module];
  const int own = static_cast<int>(blockIdx.x) - source.first, channel = source.inner + own;
  const Plane<T, STAGED> x(source.map, own, dynamic_shared());
  const Plane<T, false> out(module.hidden, channel, nullptr);
  float taps[TAPS];
  load_taps(module, channel, taps);
  if (STAGED) {
    for_each(call, [&](int b, int n) { x.put(call, b, n, x.load(b, n)); });
    __syncthreads();
  }
  float mean, var;
  if (call.training) {
    Moments moments;
    for_each(call, [&](int b, int n) { add(moments, filtered(call, x, taps, b, n)); });
    moments = block_merge(moments, scratch);
    mean = moments.mean;
    var = moments.squares / moments.count;
    if (threadIdx.x == 0) keep_statistics(module, channel, moments);
  } else {
    mean = module.mean.get(channel);
    var = module.var.get(channel);
  }
  const Standard standard(module, channel, mean, var);
  for_each(call, [&](int b, int n) {
    out.store(b, n, standard.rectified(standard.of(filtered(call, x, taps, b, n))));
  });
}

template <typename T, bool STAGED>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_bwd_channel_kernel(const __grid_constant__ Call call) {
  __shared__ double sums[WARPS];
  const Source& source = source_of(call, blockIdx.x);
  const Module& module = call.module[source.module];
  const int own = static_cast<int>(blockIdx.x) - source.first, channel = source.inner + own;
  const int count = call.batch * spatial(call);
  const Plane<T, STAGED> x(source.map, own, dynamic_shared());
  // Gradients of the ReLU's output, then of the stencil's.
  const Plane<T, STAGED> g(module.hidden, channel, dynamic_shared() + count);
  float taps[TAPS];
  load_taps(module, channel, taps);
  if (STAGED) {
    for_each(call, [&](int b, int n) { x.put(call, b, n, x.load(b, n)); });
    __syncthreads();
  }
  const Standard standard(module, channel, module.mean.get(channel), module.var.get(channel));
  float sum = 0, sum_x = 0;
  for_each(call, [&](int b, int n) {
    const float value = standard.of(filtered(call, x, taps, b, n));
    // As the forward rounded it.
    const float y = static_cast<float>(T(standard.rectified(value)));
    const float gradient = y <= 0 ? 0.0f : g.load(b, n);
    g.put(call, b, n, gradient);
    sum += gradient;
    sum_x += gradient * value;
  });
  // These sums cancel (a norm's gradients have none): float64 keeps them as good as eager's.
  sum = static_cast<float>(block_sum(static_cast<double>(sum), sums));
  sum_x = static_cast<float>(block_sum(static_cast<double>(sum_x), sums));
  if (threadIdx.x == 0 && module.of_bias.data) module.of_bias.put(channel, sum);
  if (threadIdx.x == 0 && module.of_weight.data) module.of_weight.put(channel, sum_x);
  if (!source.gradient.data && !module.of_taps.data) return;
  const float used = call.training ? sum : 0.0f, used_x = call.training ? sum_x : 0.0f;
  for_each(call, [&](int b, int n) {
    const float value = standard.of(filtered(call, x, taps, b, n));
    const float slope = norm_slope(g.get(call, b, n), value, used, used_x, static_cast<float>(count), standard.weight,
                                   standard.inverse);
    g.put(call, b, n, slope);
  });
  __syncthreads();
  if (source.gradient.data) {
    const Plane<T, false> out(source.gradient, own, nullptr);
    // The stencil turned round.
    float turned[TAPS];
    for (int i = 0; i < TAPS; ++i) turned[i] = taps[TAPS - 1 - i];
    for_each(call, [&](int b, int n) { out.store(b, n, filtered(call, g, turned, b, n)); });
  }
  if (!module.of_taps.data) return;
  float of_taps[TAPS] = {};
  for_each(call, [&](int b, int n) {
    const int row = n / call.width, column = n % call.width;
    const float slope = g.get(call, b, n);
#pragma unroll
    for (int i = 0; i < TAPS; ++i) {
      if (reaches(call, row, column, i)) of_taps[i] += slope * x.get(call, b, n + step(call, i));
    }
  });
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
    const auto total = static_cast<float>(block_sum(static_cast<double>(of_taps[i]), sums));
    if (threadIdx.x == 0) module.of_taps.put(channel * TAPS + i, total);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of 32 V channels and a share of the positions: a warp's threads stand side by side on the channels, V of them
// each, and its warps take turns at the positions.

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
__device__ Pack<T, V>* at(const Map& map, int channel, int b, int n) {
  return reinterpret_cast<Pack<T, V>*>(
      static_cast<T*>(map.data) + b * map.sample + n * map.position + channel * map.channel);
}

// The stencil on V channels; `taps` [TAPS][V].
template <typename T, int V>
__device__ void filter(
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
__device__ void load_taps(const Module& module, int channel, float (*taps)[V], bool turned) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float own[TAPS];
    load_taps(module, channel + v, own);
#pragma unroll
    for (int i = 0; i < TAPS; ++i) taps[i][v] = own[turned ? TAPS - 1 - i : i];
  }
}

// Moments [2, shares, C] of the stencil's output.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_fwd_moments_kernel(
    const __grid_constant__ Call call, float* partial) {
  __shared__ Moments scratch[V][THREADS];
  const Place<T, V> place(call);
  Moments moments[V];
  if (place.present) {
    float taps[TAPS][V], z[V];
    load_taps<V>(*place.module, place.channel, taps, false);
    for (int p = place.begin + static_cast<int>(threadIdx.x / 32); p < place.end; p += WARPS) {
      filter<T, V>(call, place.source->map, place.own, taps, p / spatial(call), p % spatial(call), z);
#pragma unroll
      for (int v = 0; v < V; ++v) add(moments[v], z[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) scratch[v][threadIdx.x] = moments[v];
  __syncthreads();
  if (threadIdx.x >= 32 || !place.present) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    Moments all = scratch[v][threadIdx.x];
    for (int warp = 1; warp < WARPS; ++warp) all = merge(all, scratch[v][warp * 32 + threadIdx.x]);
    const int64_t column = place.column() + v;
    partial[blockIdx.x * call.channels + column] = all.mean;
    partial[(call.shares + blockIdx.x) * static_cast<int64_t>(call.channels) + column] = all.squares;
  }
}

// The moments of the whole batch from those of its shares.
__device__ Moments merged(const Call& call, const float* partial, int column) {
  Moments all;
  const int count = call.batch * spatial(call);
  for (int share = 0; share < call.shares; ++share) {
    const Moments next{static_cast<float>(min(call.chunk, count - share * call.chunk)),
                       partial[share * static_cast<int64_t>(call.channels) + column],
                       partial[(call.shares + share) * static_cast<int64_t>(call.channels) + column]};
    all = merge(all, next);
  }
  return all;
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_fwd_hidden_kernel(
    const __grid_constant__ Call call, const float* partial) {
  const Place<T, V> place(call);
  if (!place.present) return;
  const Module& module = *place.module;
  float taps[TAPS][V], z[V], mean[V], inverse[V], weight[V], bias[V];
  load_taps<V>(module, place.channel, taps, false);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int channel = place.channel + v;
    float var;
    if (call.training) {
      const Moments all = merged(call, partial, place.column() + v);
      mean[v] = all.mean;
      var = all.squares / all.count;
      if (blockIdx.x == 0 && threadIdx.x < 32) keep_statistics(module, channel, all);
    } else {
      mean[v] = module.mean.get(channel);
      var = module.var.get(channel);
    }
    const Standard standard(module, channel, mean[v], var);
    inverse[v] = standard.inverse;
    weight[v] = standard.weight;
    bias[v] = standard.bias;
  }
  for (int p = place.begin + static_cast<int>(threadIdx.x / 32); p < place.end; p += WARPS) {
    const int b = p / spatial(call), n = p % spatial(call);
    filter<T, V>(call, place.source->map, place.own, taps, b, n, z);
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float y = (z[v] - mean[v]) * inverse[v] * weight[v] + bias[v];
      out.values[v] = T(y < 0 ? 0.0f : y);
    }
    *at<T, V>(module.hidden, place.channel, b, n) = out;
  }
}

// The sum of each thread's value over the warps, for the first 32 threads.
__device__ inline float over_warps(float value, float* scratch) {
  __syncthreads();
  scratch[threadIdx.x] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x < 32) {
    for (int warp = 0; warp < WARPS; ++warp) total += scratch[warp * 32 + threadIdx.x];
  }
  return static_cast<float>(total);
}

// Sums [2, shares, C] of the gradients behind the ReLU and of those times the standardised values.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_bwd_sums_kernel(
    const __grid_constant__ Call call, float* partial) {
  __shared__ float scratch[THREADS];
  const Place<T, V> place(call);
  float sum[V] = {}, sum_x[V] = {};
  if (place.present) {
    const Module& module = *place.module;
    float taps[TAPS][V], z[V], mean[V], inverse[V], weight[V], bias[V];
    load_taps<V>(module, place.channel, taps, false);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int channel = place.channel + v;
      const Standard standard(module, channel, module.mean.get(channel), module.var.get(channel));
      mean[v] = standard.mean;
      inverse[v] = standard.inverse;
      weight[v] = standard.weight;
      bias[v] = standard.bias;
    }
    for (int p = place.begin + static_cast<int>(threadIdx.x / 32); p < place.end; p += WARPS) {
      const int b = p / spatial(call), n = p % spatial(call);
      filter<T, V>(call, place.source->map, place.own, taps, b, n, z);
      const auto pack = *at<T, V>(module.hidden, place.channel, b, n);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = (z[v] - mean[v]) * inverse[v];
        const float y = static_cast<float>(T(x * weight[v] + bias[v]));
        const float gradient = y <= 0 ? 0.0f : static_cast<float>(pack.values[v]);
        sum[v] += gradient;
        sum_x[v] += gradient * x;
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float total = over_warps(sum[v], scratch), total_x = over_warps(sum_x[v], scratch);
    if (threadIdx.x < 32 && place.present) {
      const int64_t column = place.column() + v;
      partial[blockIdx.x * call.channels + column] = total;
      partial[(call.shares + blockIdx.x) * static_cast<int64_t>(call.channels) + column] = total_x;
    }
  }
}

// Gradients of the norm's parameters and, in place of those of the ReLU's output, of the stencil's output.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_bwd_norm_kernel(
    const __grid_constant__ Call call, const float* partial, bool input) {
  const Place<T, V> place(call);
  if (!place.present) return;
  const Module& module = *place.module;
  float taps[TAPS][V], z[V], mean[V], inverse[V], weight[V], bias[V], sum[V], sum_x[V];
  load_taps<V>(module, place.channel, taps, false);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int channel = place.channel + v;
    const Standard standard(module, channel, module.mean.get(channel), module.var.get(channel));
    mean[v] = standard.mean;
    inverse[v] = standard.inverse;
    weight[v] = standard.weight;
    bias[v] = standard.bias;
    double total = 0, total_x = 0;
    for (int share = 0; share < call.shares; ++share) {
      total += partial[share * static_cast<int64_t>(call.channels) + place.column() + v];
      total_x += partial[(call.shares + share) * static_cast<int64_t>(call.channels) + place.column() + v];
    }
    if (blockIdx.x == 0 && threadIdx.x < 32) {
      if (module.of_bias.data) module.of_bias.put(channel, static_cast<float>(total));
      if (module.of_weight.data) module.of_weight.put(channel, static_cast<float>(total_x));
    }
    sum[v] = call.training ? static_cast<float>(total) : 0.0f;
    sum_x[v] = call.training ? static_cast<float>(total_x) : 0.0f;
  }
  if (!input) return;
  const auto count = static_cast<float>(call.batch * spatial(call));
  for (int p = place.begin + static_cast<int>(threadIdx.x / 32); p < place.end; p += WARPS) {
    const int b = p / spatial(call), n = p % spatial(call);
    filter<T, V>(call, place.source->map, place.own, taps, b, n, z);
    auto* own = at<T, V>(module.hidden, place.channel, b, n);
    auto pack = *own;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float x = (z[v] - mean[v]) * inverse[v];
      const float y = static_cast<float>(T(x * weight[v] + bias[v]));
      const float gradient = y <= 0 ? 0.0f : static_cast<float>(pack.values[v]);
      pack.values[v] = T(norm_slope(gradient, x, sum[v], sum_x[v], count, weight[v], inverse[v]));
    }
    *own = pack;
  }
}

// Gradients of the maps.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_bwd_maps_kernel(const __grid_constant__ Call call) {
  const Place<T, V> place(call);
  if (!place.present || !place.source->gradient.data) return;
  float taps[TAPS][V], z[V];
  load_taps<V>(*place.module, place.channel, taps, true);
  for (int p = place.begin + static_cast<int>(threadIdx.x / 32); p < place.end; p += WARPS) {
    const int b = p / spatial(call), n = p % spatial(call);
    filter<T, V>(call, place.module->hidden, place.channel, taps, b, n, z);
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.values[v] = T(z[v]);
    *at<T, V>(place.source->gradient, place.own, b, n) = out;
  }
}

// Parts [shares, C, TAPS] of the gradients of the weights.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 2) concat_fuse_bwd_taps_kernel(
    const __grid_constant__ Call call, float* partial) {
  __shared__ float scratch[THREADS];
  const Place<T, V> place(call);
  float of_taps[TAPS][V] = {};
  if (place.present) {
    for (int p = place.begin + static_cast<int>(threadIdx.x / 32); p < place.end; p += WARPS) {
      const int b = p / spatial(call), n = p % spatial(call), row = n / call.width, column = n % call.width;
      const auto slope = *at<T, V>(place.module->hidden, place.channel, b, n);
#pragma unroll
      for (int i = 0; i < TAPS; ++i) {
        if (!reaches(call, row, column, i)) continue;
        const auto pack = *at<T, V>(place.source->map, place.own, b, n + step(call, i));
#pragma unroll
        for (int v = 0; v < V; ++v) {
          of_taps[i][v] += static_cast<float>(slope.values[v]) * static_cast<float>(pack.values[v]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float total = over_warps(of_taps[i][v], scratch);
      if (threadIdx.x < 32 && place.present) {
        partial[(blockIdx.x * static_cast<int64_t>(call.channels) + place.column() + v) * TAPS + i] = total;
      }
    }
  }
}

// Their sums, a thread for each weight.
__global__ void __launch_bounds__(THREADS, BLOCKS) concat_fuse_bwd_reduce_kernel(
    const __grid_constant__ Call call, const float* partial) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (i >= static_cast<int64_t>(call.channels) * TAPS) return;
  const int column = static_cast<int>(i / TAPS);
  const Source& source = source_of(call, column);
  const Module& module = call.module[source.module];
  if (!module.of_taps.data) return;
  double total = 0;
  for (int share = 0; share < call.shares; ++share) total += partial[share * static_cast<int64_t>(call.channels) * TAPS + i];
  module.of_taps.put((source.inner + column - source.first) * static_cast<int64_t>(TAPS) + i % TAPS,
                     static_cast<float>(total));
}

// --- on the host -----------------------------------------------------------------------------------------------------

// How the maps of a call are walked through.
struct Way {
  bool last;   // all are channels-last
  bool pairs;  // channels can be taken two at a time
  bool staged;
};

// The description that all launches of a call share. `parameters`: 3x3 weights, weight and bias of each module;
// `statistics`: mean and var of each; `options`: momentum and eps of each.
Call describe(
    const std::vector<Tensor>& features, const std::vector<int64_t>& counts, const std::vector<Tensor>& parameters,
    const std::vector<Tensor>& statistics, bool training, const std::vector<double>& options,
    const std::vector<Tensor>& hidden) {
  STD_TORCH_CHECK(features.size() <= MOST_MAPS && counts.size() <= MOST_MODULES, "at most ", MOST_MAPS, " maps of ",
                  MOST_MODULES, " modules share a launch");
  Call call{};
  const Tensor& x = features[0];
  call.batch = static_cast<int32_t>(x.size(0));
  call.height = static_cast<int32_t>(x.size(2));
  call.width = static_cast<int32_t>(x.size(3));
  const int64_t positions = x.size(0) * x.size(2) * x.size(3);
  STD_TORCH_CHECK(positions < (int64_t{1} << 31), "a channel has at most 2^31 values");
  const int64_t share = (positions + SHARES - 1) / SHARES;
  call.chunk = static_cast<int32_t>(share > LEAST ? share : LEAST);
  call.shares = static_cast<int32_t>(blocks(positions, call.chunk));
  call.training = training;
  for (size_t m = 0, s = 0; m < counts.size(); ++m) {
    Module& module = call.module[m];
    const Tensor& taps = parameters[3 * m];
    module.taps = vector_of(taps);
    module.tap_c = taps.stride(0);
    module.tap_i = taps.stride(2);
    module.tap_j = taps.stride(3);
    module.weight = vector_of(parameters[3 * m + 1]);
    module.bias = vector_of(parameters[3 * m + 2]);
    module.mean = vector_of(statistics[2 * m]);
    module.var = vector_of(statistics[2 * m + 1]);
    module.momentum = static_cast<float>(options[2 * m]);
    module.eps = static_cast<float>(options[2 * m + 1]);
    module.hidden = map_of(hidden[m]);
    module.channels = module.hidden.channels;
    int32_t inner = 0;
    for (int64_t i = 0; i < counts[m]; ++i, ++s) {
      Source& source = call.source[s];
      source.map = map_of(features[s]);
      source.module = static_cast<int32_t>(m);
      source.inner = inner;
      source.first = call.channels;
      inner += source.map.channels;
      call.channels += source.map.channels;
    }
    call.maps = static_cast<int32_t>(s);
  }
  return call;
}

bool in_pairs(const Map& map) {
  return map.channel == 1 && map.channels % 2 == 0 && map.position % 2 == 0 && map.sample % 2 == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % 4 == 0;
}

// Chooses the way and numbers the tiles of channels for it.
Way way_of(Call& call, int buffers) {
  Way way{true, call.source[0].map.type != 0, false};
  for (int s = 0; s < call.maps; ++s) {
    const Source& source = call.source[s];
    const Map& hidden = call.module[source.module].hidden;
    way.last = way.last && source.map.last;
    way.pairs = way.pairs && in_pairs(source.map) && in_pairs(hidden) && source.inner % 2 == 0 &&
                (!source.gradient.data || in_pairs(source.gradient));
  }
  const int width = way.pairs ? 64 : 32;
  call.tiles = 0;
  for (int s = 0; s < call.maps; ++s) {
    call.source[s].first_tile = call.tiles;
    call.tiles += static_cast<int32_t>(blocks(call.source[s].map.channels, width));
  }
  way.staged = static_cast<int64_t>(call.batch) * call.height * call.width * 4 * buffers <= FASTFUSE_MOST_SHARED;
  return way;
}

// Calls `function` with a value of the maps' type and a number: channels taken at a time, or for whole channels 1 if they
// are held in shared memory and 2 if not.
template <typename F>
void with_way(const Call& call, const Way& way, F&& function) {
  const int type = call.source[0].map.type;
  using One = std::integral_constant<int, 1>;
  const auto typed = [&](auto number) {
    if (type == 0) {
      function(float{}, number);
    } else if (type == 1) {
      function(Half{}, number);
    } else {
      function(BFloat16{}, number);
    }
  };
  if (way.last ? way.pairs : !way.staged) {
    typed(std::integral_constant<int, 2>{});
  } else {
    typed(One{});
  }
}

Tensor table(const Tensor& like, int64_t rows, const Call& call, int64_t columns) {
  return torch::stable::new_empty(like, {rows, call.shares, call.channels * columns}, ScalarType::Float);
}

dim3 tile_grid(const Call& call) { return {static_cast<unsigned>(call.shares), static_cast<unsigned>(call.tiles)}; }

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

size_t staged_bytes(const Call& call, const Way& way, int buffers) {
  return way.staged ? static_cast<size_t>(call.batch) * call.height * call.width * 4 * buffers : 0;
}

void concat_fuse_fwd_first(
    std::vector<Tensor> features, std::vector<int64_t> counts, std::vector<Tensor> parameters,
    std::vector<Tensor> running, bool training, std::vector<double> options, std::vector<Tensor> hidden,
    std::vector<Tensor> statistics) {
  const OnDevice device(features[0]);
  Call call = describe(features, counts, parameters, running, training, options, hidden);
  for (size_t m = 0; m < counts.size() && training; ++m) call.module[m].statistics = floats(statistics[m]);
  const Way way = way_of(call, 1);
  const Tensor partial = table(features[0], 2, call, way.last && training ? 1 : 0);
  with_way(call, way, [&](auto kind, auto number) {
    using T = decltype(kind);
    constexpr bool FIRST = decltype(number)::value == 1;
    constexpr int V = FIRST || sizeof(T) == 4 ? 1 : 2;
    if (!way.last) {
      launch("concat_fuse_fwd_channel_kernel", concat_fuse_fwd_channel_kernel<T, FIRST>,
             dim3(static_cast<unsigned>(call.channels)), staged_bytes(call, way, 1), device, call);
      return;
    }
    if (training) {
      launch("concat_fuse_fwd_moments_kernel", concat_fuse_fwd_moments_kernel<T, V>, tile_grid(call), 0, device, call,
             floats(partial));
    }
    launch("concat_fuse_fwd_hidden_kernel", concat_fuse_fwd_hidden_kernel<T, V>, tile_grid(call), 0, device, call,
           static_cast<const float*>(floats(partial)));
  });
}

// `gradients` holds those that are needed, of each module's 3x3 weights, weight and bias and of its maps.
void concat_fuse_bwd_first(
    std::vector<Tensor> features, std::vector<int64_t> counts, std::vector<Tensor> parameters,
    std::vector<Tensor> statistics, bool training, std::vector<double> options, std::vector<Tensor> of_hidden,
    std::vector<Tensor> gradients, std::vector<bool> needs) {
  const OnDevice device(features[0]);
  Call call = describe(features, counts, parameters, statistics, training, options, of_hidden);
  size_t given = 0, asked = 0;
  bool of_taps = false, of_maps = false;
  for (size_t m = 0, s = 0; m < counts.size(); ++m) {
    Module& module = call.module[m];
    for (Vector* out : {&module.of_taps, &module.of_weight, &module.of_bias}) {
      if (needs[asked++]) *out = vector_of(gradients[given++]);
    }
    of_taps = of_taps || module.of_taps.data;
    for (int64_t i = 0; i < counts[m]; ++i, ++s) {
      if (!needs[asked++]) continue;
      call.source[s].gradient = map_of(gradients[given++]);
      of_maps = true;
    }
  }
  const Way way = way_of(call, 2);
  const Tensor sums = table(features[0], 2, call, way.last ? 1 : 0);
  const Tensor parts = table(features[0], 1, call, way.last && of_taps ? TAPS : 0);
  with_way(call, way, [&](auto kind, auto number) {
    using T = decltype(kind);
    constexpr bool FIRST = decltype(number)::value == 1;
    constexpr int V = FIRST || sizeof(T) == 4 ? 1 : 2;
    if (!way.last) {
      launch("concat_fuse_bwd_channel_kernel", concat_fuse_bwd_channel_kernel<T, FIRST>,
             dim3(static_cast<unsigned>(call.channels)), staged_bytes(call, way, 2), device, call);
      return;
    }
    launch("concat_fuse_bwd_sums_kernel", concat_fuse_bwd_sums_kernel<T, V>, tile_grid(call), 0, device, call,
           floats(sums));
    launch("concat_fuse_bwd_norm_kernel", concat_fuse_bwd_norm_kernel<T, V>, tile_grid(call), 0, device, call,
           static_cast<const float*>(floats(sums)), of_taps || of_maps);
    if (of_maps) {
      launch("concat_fuse_bwd_maps_kernel", concat_fuse_bwd_maps_kernel<T, V>, tile_grid(call), 0, device, call);
    }
    if (!of_taps) return;
    launch("concat_fuse_bwd_taps_kernel", concat_fuse_bwd_taps_kernel<T, V>, tile_grid(call), 0, device, call,
           floats(parts));
    launch("concat_fuse_bwd_reduce_kernel", concat_fuse_bwd_reduce_kernel,
           dim3(blocks(static_cast<int64_t>(call.channels) * TAPS, THREADS)), 0, device, call,
           static_cast<const float*>(floats(parts)));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse_cuda, FASTFUSE_DEVICE, m) {
  m.impl("concat_fuse_fwd_first", TORCH_BOX(&concat_fuse_fwd_first));
  m.impl("concat_fuse_bwd_first", TORCH_BOX(&concat_fuse_bwd_first));
}

}  // namespace fastfuse
