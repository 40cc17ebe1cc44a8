// What all kernels share: maps as kernels address them, sums over a block, checked launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arithmetic.h"

#ifndef FASTFUSE_DEVICE
#define FASTFUSE_DEVICE CUDA
#endif

namespace fastfuse {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Threads of a block, everywhere, and blocks that a multiprocessor should at least hold: 64 registers for each thread.
// Left to itself, the compiler takes fewer and spills.
constexpr int THREADS = 256;
constexpr int BLOCKS = 4;
constexpr int WARPS = THREADS / 32;

// --- on the host -----------------------------------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// The stream of a device, which is current as long as this lives.
class OnDevice {
 public:
#ifdef FASTFUSE_EMULATED
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifndef FASTFUSE_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// A launch of THREADS threads a block with some bytes of dynamic shared memory; nothing is launched for an empty grid.
template <typename... Parameters, typename... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, size_t shared, const OnDevice& device,
    Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) < 4096, "parameters of a kernel have 4 KiB");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) {
    const auto bytes = static_cast<int>(shared);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared;
  config.stream = device.stream();
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

inline unsigned blocks(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

// A feature map [B, C, H, W] or attention map [B, H, W]: N = H W positions with one stride.
struct Map {
  void* data;
  int64_t sample, channel, position;  // strides in elements
  int32_t channels;                   // READY for an attention map
  int8_t type;                        // 0, 1, 2: float32, float16, bfloat16
  bool last;                          // channels are contiguous and positions are not
  bool wide;                          // 16 aligned bytes can be loaded along the contiguous axis
};
constexpr int READY = -1;

inline int type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return 0;
    case ScalarType::Half: return 1;
    case ScalarType::BFloat16: return 2;
    default: STD_TORCH_CHECK(false, "kernels take float32, float16 and bfloat16");
  }
  return -1;
}

inline int64_t positions_of(const Tensor& x) { return x.size(x.dim() - 1) * x.size(x.dim() - 2); }

// Whether height and width are walked through with one stride.
inline bool collapses(const Tensor& x) {
  const int64_t h = x.dim() - 2, w = x.dim() - 1;
  return x.size(h) <= 1 || x.size(w) <= 1 || x.stride(h) == x.size(w) * x.stride(w);
}

inline Map map_of(const Tensor& x) {
  STD_TORCH_CHECK(collapses(x), "height and width of a map must have one stride");
  const int64_t h = x.dim() - 2, w = x.dim() - 1, channels = x.dim() == 4 ? x.size(1) : READY;
  Map map{};
  map.data = x.data_ptr();
  map.sample = x.stride(0);
  map.channel = x.dim() == 4 ? x.stride(1) : 0;
  map.position = x.size(w) > 1 ? x.stride(w) : x.stride(h);
  map.channels = static_cast<int32_t>(channels);
  map.type = static_cast<int8_t>(type_of(x));
  map.last = map.channel == 1 && map.position != 1 && channels > 1;
  const int64_t pack = map.type == 0 ? 4 : 8, inner = map.last ? channels : positions_of(x);
  const int64_t across = map.last ? map.position : map.channel;
  map.wide = (map.last || map.position == 1) && inner % pack == 0 && across % pack == 0 && map.sample % pack == 0 &&
             reinterpret_cast<uintptr_t>(map.data) % 16 == 0;
  return map;
}

// Memory for the gradient of a map: its own format, with one stride for its positions.
inline Tensor gradient_like(const Tensor& x) {
  Tensor found = torch::stable::empty_like(x);
  return collapses(found) ? found : torch::stable::new_empty(x, x.sizes());
}

// --- on the device ---------------------------------------------------------------------------------------------------

// As many values as are loaded or stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

// The sum of one value of each thread, the same bits in every thread; `scratch` holds WARPS values and is free again
// when all threads have returned and met once more.
template <typename S>
__device__ inline S block_sum(S value, S* scratch) {
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  S total = scratch[0];
  for (int warp = 1; warp < WARPS; ++warp) total += scratch[warp];
  return total;
}

// The dynamic shared memory of a block.
__device__ inline float* dynamic_shared() {
#ifdef FASTFUSE_EMULATED
  return reinterpret_cast<float*>(emulated::block.shared.data());
#else
  extern __shared__ __align__(16) float memory[];
  return memory;
#endif
}

// A value of a parameter, whatever its type.
struct Vector {
  void* data;
  int8_t type;
  __device__ float get(int64_t i) const {
    if (type == 0) return static_cast<const float*>(data)[i];
    if (type == 1) return static_cast<float>(static_cast<const Half*>(data)[i]);
    return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
  }
  __device__ void put(int64_t i, float value) const {
    if (type == 0) {
      static_cast<float*>(data)[i] = value;
    } else if (type == 1) {
      static_cast<Half*>(data)[i] = Half(value);
    } else {
      static_cast<BFloat16*>(data)[i] = BFloat16(value);
    }
  }
};

inline Vector vector_of(const Tensor& x) { return {x.data_ptr(), static_cast<int8_t>(type_of(x))}; }

// Calls `function` with a value of the map's element type.
template <typename F>
__device__ inline void with_type(int type, F&& function) {
  if (type == 0) {
    function(float{});
  } else if (type == 1) {
    function(Half{});
  } else {
    function(BFloat16{});
  }
}

}  // namespace fastfuse
