// Forward of the first part of concat_fuse; see concat_fuse.cuh.
#include "concat_fuse_channels.cuh"
#include "concat_fuse_host.cuh"
#include "concat_fuse_tiles.cuh"

namespace fastfuse {
namespace {

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
    partial[blockIdx.x * static_cast<int64_t>(call.channels) + column] = all.mean;
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse_cuda, FASTFUSE_DEVICE, m) {
  m.impl("concat_fuse_fwd_first", TORCH_BOX(&concat_fuse_fwd_first));
}

}  // namespace fastfuse
