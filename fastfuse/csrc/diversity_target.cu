// diversity_loss and diversity_target: one block per sample and pair keeps both attention maps in shared memory, finds
// the threshold there, and writes the loss, its derivative and the shifted map; a small launch adds the samples. Backward
// one launch. See fastfuse/kernels/diversity_target/README.md.
#include "attention.cuh"

namespace fastfuse {
namespace {

constexpr int MOST_PAIRS = 28;
constexpr int MOST_POSITIONS = 1024;

struct Pair {
  Map x, y, shifted;  // without data where there is none
  int32_t batch, positions;
};
struct Pairs {
  Pair pair[MOST_PAIRS];
  int32_t first;  // of the launch among all
};

// A sample's attention map in shared memory, over its norm; the norm.
__device__ __forceinline__ float normalised(
    const Map& map, int64_t sample, int positions, float* values, float* scratch, float* sums) {
  attention_of(map, sample, positions, {values, static_cast<float>(map.channels), false}, scratch);
  __syncthreads();
  float square = 0;
  for (int n = threadIdx.x; n < positions; n += THREADS) square += values[n] * values[n];
  const float norm = sqrtf(block_sum(square, sums)), divisor = fmaxf(norm, 1e-12f);
  for (int n = threadIdx.x; n < positions; n += THREADS) values[n] /= divisor;
  return norm;
}

__global__ void __launch_bounds__(THREADS, BLOCKS) diversity_target_fwd_sample_kernel(
    const __grid_constant__ Pairs pairs, float* losses, float* slope, int64_t row, int64_t width, bool published) {
  __shared__ float scratch[THREADS * WIDEST];
  __shared__ float values[MOST_POSITIONS], target[MOST_POSITIONS], shift[MOST_POSITIONS];
  __shared__ float sums[WARPS];
  __shared__ int counts[WARPS];
  const Pair& pair = pairs.pair[blockIdx.y];
  const int64_t sample = blockIdx.x;
  const int positions = pair.positions;
  if (sample >= pair.batch) return;
  const float y_norm = normalised(pair.y, sample, positions, values, scratch, sums);
  const float threshold = kth_smallest(positions / 3, [&](unsigned bits) {
    int below = 0;
    for (int n = threadIdx.x; n < positions; n += THREADS) below += ordered_bits(values[n]) < bits;
    return block_sum(below, counts);
  });
  const float half = published ? y_norm / 2 : 0.5f;
  for (int n = threadIdx.x; n < positions; n += THREADS) {
    target[n] = shifted(values[n], threshold, half);
    shift[n] = (target[n] - values[n]) * y_norm / static_cast<float>(pair.y.channels);
  }
  __syncthreads();
  if (pair.shifted.data) {
    transform_map(pair.y, pair.shifted, sample, 0, positions, [&](float y, int n) { return y + shift[n]; });
  }
  if (!pair.x.data) return;
  const float norm = normalised(pair.x, sample, positions, values, scratch, sums);
  float square = 0, along = 0;
  for (int n = threadIdx.x; n < positions; n += THREADS) {
    const float error = values[n] - target[n];
    square += error * error;
    along += values[n] * error;
  }
  square = block_sum(square, sums);
  along = block_sum(along, sums);
  const int64_t place = (pairs.first + blockIdx.y) * row + sample;
  if (threadIdx.x == 0) losses[place] = square / static_cast<float>(positions);
  float per_value = 2.0f / static_cast<float>(positions);
  if (pair.x.channels != READY) per_value *= 2.0f / static_cast<float>(pair.x.channels);
  for (int n = threadIdx.x; n < positions; n += THREADS) {
    // (xh.t) xh - t, written so that it does not cancel where xh is close to t.
    const float value = per_value * (values[n] - target[n] - values[n] * along) / fmaxf(norm, 1e-12f);
    slope[place * width + n] = norm < 1e-12f ? 0.0f : value;
  }
}

__global__ void __launch_bounds__(THREADS, BLOCKS) diversity_target_fwd_reduce_kernel(
    const __grid_constant__ Batches batches, const float* per_sample, int64_t row, float* losses, bool mean) {
  add_samples(batches, per_sample, row, losses, mean);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) diversity_target_bwd_map_kernel(
    const __grid_constant__ Items items, const float* cotangent, int64_t stride_pair, int64_t stride_sample,
    const float* slope, int64_t row, int64_t width, bool mean) {
  __shared__ float factor[CHUNK];
  const Item& item = items.item[blockIdx.z];
  const int64_t sample = blockIdx.x;
  const int first = static_cast<int>(blockIdx.y) * CHUNK;
  if (sample >= item.batch || first >= item.positions) return;
  float upstream = cotangent[item.pair * stride_pair + sample * stride_sample];
  if (mean) upstream /= static_cast<float>(item.batch);
  for (int i = threadIdx.x; i < CHUNK && first + i < item.positions; i += THREADS) {
    factor[i] = upstream * slope[(item.pair * row + sample) * width + first + i];
  }
  __syncthreads();
  scale_map(item, sample, first, factor);
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> diversity_target_fwd(
    std::vector<Tensor> x, std::vector<Tensor> y, std::string mode, std::string reduction, bool shift) {
  STD_TORCH_CHECK(x.size() <= MOST && (x.empty() || x.size() == y.size()), "at most ", MOST, " pairs share a launch");
  const OnDevice device(y[0]);
  Batches batches{};
  int64_t row = 0, width = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t batch = y[i].size(0), positions = positions_of(y[i]);
    STD_TORCH_CHECK(positions <= MOST_POSITIONS, "a map has at most ", MOST_POSITIONS, " positions");
    if (i < x.size()) batches.batch[i] = static_cast<int32_t>(batch);
    row = batch > row ? batch : row;
    width = positions > width ? positions : width;
  }
  const auto count = static_cast<int64_t>(x.size());
  Tensor per_sample = torch::stable::new_empty(y[0], {count, row}, ScalarType::Float);
  Tensor slope = torch::stable::new_empty(y[0], {count, row, width}, ScalarType::Float);
  auto* values = static_cast<float*>(per_sample.data_ptr());
  std::vector<Tensor> made;
  for (size_t begin = 0; begin < y.size(); begin += MOST_PAIRS) {
    Pairs pairs{};
    pairs.first = static_cast<int32_t>(begin);
    unsigned used = 0;
    for (; used < MOST_PAIRS && begin + used < y.size(); ++used) {
      const size_t i = begin + used;
      Pair& pair = pairs.pair[used];
      pair.y = map_of(y[i]);
      pair.batch = static_cast<int32_t>(y[i].size(0));
      pair.positions = static_cast<int32_t>(positions_of(y[i]));
      if (i < x.size()) pair.x = map_of(x[i]);
      if (shift) {
        made.push_back(gradient_like(y[i]));
        pair.shifted = map_of(made[i]);
      }
    }
    launch("diversity_target_fwd_sample_kernel", diversity_target_fwd_sample_kernel,
           dim3(static_cast<unsigned>(row), used), 0, device, pairs, values, static_cast<float*>(slope.data_ptr()), row,
           width, mode == "published");
  }
  if (reduction == "none" || x.empty()) {
    Tensor losses = reduction == "none" ? per_sample : torch::stable::new_empty(y[0], {count}, ScalarType::Float);
    return {losses, slope, made};
  }
  Tensor losses = torch::stable::new_empty(y[0], {count}, ScalarType::Float);
  launch("diversity_target_fwd_reduce_kernel", diversity_target_fwd_reduce_kernel, dim3(static_cast<unsigned>(count)), 0,
         device, batches, static_cast<const float*>(values), row, static_cast<float*>(losses.data_ptr()),
         reduction == "mean");
  return {losses, slope, made};
}

std::vector<Tensor> diversity_target_bwd(
    Tensor cotangent, Tensor slope, std::vector<Tensor> x, std::vector<int64_t> pairs, std::string reduction) {
  const OnDevice device(slope);
  STD_TORCH_CHECK(x.size() <= MOST, "at most ", MOST, " maps share a launch");
  std::vector<Tensor> gradients;
  Items items{};
  int64_t samples = 0, positions = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    gradients.push_back(gradient_like(x[i]));
    Item& item = items.item[i];
    item = item_of(x[i], gradients[i]);
    item.pair = static_cast<int32_t>(pairs[i]);
    samples = item.batch > samples ? item.batch : samples;
    positions = item.positions > positions ? item.positions : positions;
  }
  const dim3 grid(static_cast<unsigned>(samples), blocks(positions, CHUNK), static_cast<unsigned>(x.size()));
  launch("diversity_target_bwd_map_kernel", diversity_target_bwd_map_kernel, grid, 0, device, items,
         static_cast<const float*>(cotangent.data_ptr()), cotangent.stride(0),
         reduction == "none" ? cotangent.stride(1) : 0, static_cast<const float*>(slope.data_ptr()), slope.size(1),
         slope.size(2), reduction == "mean");
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfuse_cuda, FASTFUSE_DEVICE, m) {
  m.impl("diversity_target_fwd", TORCH_BOX(&diversity_target_fwd));
  m.impl("diversity_target_bwd", TORCH_BOX(&diversity_target_bwd));
}

}  // namespace fastfuse
