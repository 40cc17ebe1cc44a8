// Backward of the first part of concat_fuse; see concat_fuse.cuh.
#include "concat_fuse_channels.cuh"
#include "concat_fuse_host.cuh"
#include "concat_fuse_tiles.cuh"

namespace fastfuse {
namespace {

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
    if (threadIdx.x == 0) module.of_taps.put(channel * static_cast<int64_t>(TAPS) + i, total);
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
      partial[blockIdx.x * static_cast<int64_t>(call.channels) + column] = total;
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
  m.impl("concat_fuse_bwd_first", TORCH_BOX(&concat_fuse_bwd_first));
}

}  // namespace fastfuse
