// attention_mse: forward one launch over (sample, pair) and a small one that adds the samples, backward one launch over
// (sample, positions, map that needs a gradient); attention_map: one launch each way.
// See fastfuse/kernels/attention_mse/README.md.
#include "attention.cuh"

namespace fastfuse {
namespace {

struct Pair {
  Map map[2];  // input and target
  int64_t start;  // of the pair's attention maps among all
  int32_t batch, positions;
};
struct Pairs {
  Pair pair[MOST];
};

struct Maps {
  Map map[MOST];
};

// What the backward reads besides the maps: attention maps [2, half], stats [4, pairs, row] and the losses' gradients.
struct Saved {
  const float *cotangent, *maps, *stats;
  int64_t cotangent_pair, cotangent_sample, half, plane, row;
  bool mean;
};

__global__ void __launch_bounds__(THREADS, BLOCKS) attention_mse_fwd_pair_kernel(
    const __grid_constant__ Pairs pairs, float* maps, int64_t half, float* stats, float* losses, int64_t row) {
  __shared__ float scratch[THREADS * WIDEST];
  __shared__ float sums[WARPS];
  const Pair& pair = pairs.pair[blockIdx.y];
  const int64_t sample = blockIdx.x;
  if (sample >= pair.batch) return;
  float* own = maps + pair.start + sample * pair.positions;
  float* goal = own + half;
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const Map& map = pair.map[side];
    const Attention to{side ? goal : own, static_cast<float>(map.channels), false};
    attention_of(map, sample, pair.positions, to, scratch);
  }
  // The maps come back from memory, perhaps to other threads of the block than those that wrote them.
  __syncthreads();
  float own_square = 0, goal_square = 0;
  for (int n = threadIdx.x; n < pair.positions; n += THREADS) {
    own_square += own[n] * own[n];
    goal_square += goal[n] * goal[n];
  }
  const float own_norm = sqrtf(block_sum(own_square, sums)), goal_norm = sqrtf(block_sum(goal_square, sums));
  const float own_scale = normaliser(own_norm), goal_scale = normaliser(goal_norm);
  float square = 0, own_dot = 0, goal_dot = 0;
  for (int n = threadIdx.x; n < pair.positions; n += THREADS) {
    const float a = rounded_product(own[n], own_scale), t = rounded_product(goal[n], goal_scale);
    square += (a - t) * (a - t);
    own_dot += a * (a - t);
    goal_dot += t * (t - a);
  }
  square = block_sum(square, sums);
  own_dot = block_sum(own_dot, sums);
  goal_dot = block_sum(goal_dot, sums);
  if (threadIdx.x == 0) {
    const int64_t place = blockIdx.y * row + sample, plane = gridDim.y * row;
    losses[place] = square / static_cast<float>(pair.positions);
    stats[place] = own_norm;
    stats[plane + place] = goal_norm;
    stats[2 * plane + place] = own_dot;
    stats[3 * plane + place] = goal_dot;
  }
}

__global__ void __launch_bounds__(THREADS, BLOCKS) attention_mse_fwd_reduce_kernel(
    const __grid_constant__ Batches batches, const float* per_sample, int64_t row, float* losses, bool mean) {
  add_samples(batches, per_sample, row, losses, mean);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) attention_mse_bwd_map_kernel(
    const __grid_constant__ Items items, const __grid_constant__ Saved saved) {
  __shared__ float factor[CHUNK];
  const Item& item = items.item[blockIdx.z];
  const int64_t sample = blockIdx.x;
  const int first = static_cast<int>(blockIdx.y) * CHUNK;
  if (sample >= item.batch || first >= item.positions) return;
  const int64_t place = item.pair * saved.row + sample;
  const float* own = saved.maps + item.side * saved.half + item.start + sample * item.positions;
  const float* other = own + (item.side ? -saved.half : saved.half);
  const float own_norm = saved.stats[item.side * saved.plane + place];
  const float other_norm = saved.stats[(1 - item.side) * saved.plane + place];
  const float dot = saved.stats[(2 + item.side) * saved.plane + place];
  float upstream = saved.cotangent[item.pair * saved.cotangent_pair + sample * saved.cotangent_sample];
  if (saved.mean) upstream /= static_cast<float>(item.batch);
  if (item.map.channels != READY) upstream *= 2.0f / static_cast<float>(item.map.channels);
  for (int i = threadIdx.x; i < CHUNK && first + i < item.positions; i += THREADS) {
    const int n = first + i;
    factor[i] = upstream * distance_slope(own[n], other[n], own_norm, other_norm, dot, item.positions);
  }
  __syncthreads();
  scale_map(item, sample, first, factor);
}

// One block per sample adds the squares of all maps.
__global__ void __launch_bounds__(THREADS, BLOCKS) attention_map_fwd_kernel(
    const __grid_constant__ Maps maps, int count, int positions, float total, float* attention) {
  __shared__ float scratch[THREADS * WIDEST];
  const int64_t sample = blockIdx.x;
  for (int s = 0; s < count; ++s) {
    attention_of(maps.map[s], sample, positions, {attention + sample * positions, total, s > 0}, scratch);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(THREADS, BLOCKS) attention_map_bwd_kernel(
    const __grid_constant__ Items items, const float* cotangent, int64_t stride_b, int64_t stride_n, float total) {
  __shared__ float factor[CHUNK];
  const Item& item = items.item[blockIdx.z];
  const int first = static_cast<int>(blockIdx.y) * CHUNK;
  for (int i = threadIdx.x; i < CHUNK && first + i < item.positions; i += THREADS) {
    factor[i] = cotangent[blockIdx.x * stride_b + (first + i) * stride_n] * 2.0f / total;
  }
  __syncthreads();
  scale_map(item, blockIdx.x, first, factor);
}

std::tuple<Tensor, Tensor, Tensor> attention_mse_fwd(
    std::vector<Tensor> inputs, std::vector<Tensor> targets, std::string reduction) {
  STD_TORCH_CHECK(inputs.size() <= MOST && inputs.size() == targets.size(), "at most ", MOST, " pairs share a launch");
  const auto count = static_cast<int64_t>(inputs.size());
  const OnDevice device(inputs[0]);
  Pairs pairs{};
  Batches batches{};
  int64_t total = 0, row = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t batch = inputs[i].size(0), positions = positions_of(inputs[i]);
    pairs.pair[i] = {{map_of(inputs[i]), map_of(targets[i])}, total, static_cast<int32_t>(batch),
                     static_cast<int32_t>(positions)};
    batches.batch[i] = static_cast<int32_t>(batch);
    total += batch * positions;
    row = batch > row ? batch : row;
  }
  const auto wide = ScalarType::Float;
  Tensor maps = torch::stable::new_empty(inputs[0], {2, total}, wide);
  Tensor stats = torch::stable::new_empty(inputs[0], {4, count, row}, wide);
  Tensor per_sample = torch::stable::new_empty(inputs[0], {count, row}, wide);
  auto* values = static_cast<float*>(per_sample.data_ptr());
  const dim3 grid(static_cast<unsigned>(row), static_cast<unsigned>(count));
  launch("attention_mse_fwd_pair_kernel", attention_mse_fwd_pair_kernel, grid, 0, device, pairs,
         static_cast<float*>(maps.data_ptr()), total, static_cast<float*>(stats.data_ptr()), values, row);
  if (reduction == "none") return {per_sample, maps, stats};
  Tensor losses = torch::stable::new_empty(inputs[0], {count}, wide);
  launch("attention_mse_fwd_reduce_kernel", attention_mse_fwd_reduce_kernel, dim3(static_cast<unsigned>(count)), 0,
         device, batches, static_cast<const float*>(values), row, static_cast<float*>(losses.data_ptr()),
         reduction == "mean");
  return {losses, maps, stats};
}

std::vector<Tensor> attention_mse_bwd(
    Tensor cotangent, Tensor maps, Tensor stats, std::vector<Tensor> wanted, std::vector<int64_t> places,
    std::vector<int64_t> starts, std::string reduction) {
  const OnDevice device(maps);
  const int64_t pairs = stats.size(1), row = stats.size(2);
  const Saved saved{static_cast<const float*>(cotangent.data_ptr()),
                    static_cast<const float*>(maps.data_ptr()),
                    static_cast<const float*>(stats.data_ptr()),
                    cotangent.stride(0),
                    reduction == "none" ? cotangent.stride(1) : 0,
                    maps.size(1),
                    pairs * row,
                    row,
                    reduction == "mean"};
  std::vector<Tensor> gradients;
  for (size_t begin = 0; begin < wanted.size(); begin += MOST) {
    Items items{};
    unsigned count = 0;
    int64_t samples = 0, positions = 0;
    for (; count < MOST && begin + count < wanted.size(); ++count) {
      const size_t i = begin + count;
      gradients.push_back(gradient_like(wanted[i]));
      Item& item = items.item[count];
      item = item_of(wanted[i], gradients[i]);
      item.start = starts[i];
      item.pair = static_cast<int32_t>(places[i] % pairs);
      item.side = static_cast<int32_t>(places[i] / pairs);
      samples = item.batch > samples ? item.batch : samples;
      positions = item.positions > positions ? item.positions : positions;
    }
    launch("attention_mse_bwd_map_kernel", attention_mse_bwd_map_kernel,
           dim3(static_cast<unsigned>(samples), blocks(positions, CHUNK), count), 0, device, items, saved);
  }
  return gradients;
}

Tensor attention_map_fwd(std::vector<Tensor> features) {
  STD_TORCH_CHECK(features.size() <= MOST, "at most ", MOST, " maps share a launch");
  const OnDevice device(features[0]);
  Maps maps{};
  int64_t total = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    maps.map[i] = map_of(features[i]);
    total += features[i].size(1);
  }
  const Tensor& first = features[0];
  const int64_t batch = first.size(0);
  Tensor attention = torch::stable::new_empty(first, {batch, first.size(2), first.size(3)}, ScalarType::Float);
  launch("attention_map_fwd_kernel", attention_map_fwd_kernel, dim3(static_cast<unsigned>(batch)), 0, device, maps,
         static_cast<int>(features.size()), static_cast<int>(positions_of(first)), static_cast<float>(total),
         static_cast<float*>(attention.data_ptr()));
  return attention;
}

std::vector<Tensor> attention_map_bwd(Tensor cotangent, std::vector<Tensor> wanted, int64_t total) {
  const OnDevice device(cotangent);
  std::vector<Tensor> gradients;
  Items items{};
  STD_TORCH_CHECK(wanted.size() <= MOST, "at most ", MOST, " maps share a launch");
  STD_TORCH_CHECK(collapses(cotangent), "height and width of the attention map's gradient must have one stride");
  for (size_t i = 0; i < wanted.size(); ++i) {
    gradients.push_back(gradient_like(wanted[i]));
    items.item[i] = item_of(wanted[i], gradients[i]);
  }
  const Map from = map_of(cotangent);
  const dim3 grid(static_cast<unsigned>(cotangent.size(0)), blocks(positions_of(cotangent), CHUNK),
                  static_cast<unsigned>(wanted.size()));
  launch("attention_map_bwd_kernel", attention_map_bwd_kernel, grid, 0, device, items,
         static_cast<const float*>(from.data), from.sample, from.position, static_cast<float>(total));
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse_cuda, FASTFUSE_DEVICE, m) {
  m.impl("attention_map_fwd", TORCH_BOX(&attention_map_fwd));
  m.impl("attention_map_bwd", TORCH_BOX(&attention_map_bwd));
  m.impl("attention_mse_fwd", TORCH_BOX(&attention_mse_fwd));
  m.impl("attention_mse_bwd", TORCH_BOX(&attention_mse_bwd));
}

}  // namespace fastfuse
