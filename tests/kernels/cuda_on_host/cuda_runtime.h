// Runs kernels in CUDA C++ on the host, so that they can be tested without a GPU: as much of CUDA as fastfuse/csrc uses.
//
// The threads of a block are fibers of one thread. Each runs until it must wait for others, at __syncthreads or at a
// shuffle among its warp; then the next one runs. FASTFUSE_EMULATED_ORDER=backward runs them from the last to the
// first: what depends on a missing __syncthreads then differs. A wait that cannot end aborts. Shared memory is filled
// with NaN before each block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline const char* cudaGetErrorString(int) { return "no error"; }
template <typename F>
int cudaFuncSetAttribute(F*, int, int) { return cudaSuccess; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulated {

constexpr size_t STACK = 128 * 1024;

// A place where `expected` fibers meet.
struct Meeting {
  unsigned arrived = 0, expected = 0, round = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<uint64_t> shuffled;
  Meeting all;
  ucontext_t scheduler;
  unsigned current = 0;
  uint64_t progress = 0;
  std::vector<unsigned char> shared;
  const std::function<void()>* body = nullptr;
};
inline Block block;

inline void pass_if_complete(Meeting& meeting) {
  if (meeting.expected && meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
    ++block.progress;
  }
}

inline void meet(Meeting& meeting) {
  const unsigned round = meeting.round, own = block.current;
  ++meeting.arrived;
  pass_if_complete(meeting);
  while (meeting.round == round) {
    swapcontext(&block.fibers[own].context, &block.scheduler);
  }
}

inline void run_fiber() {
  const unsigned own = block.current;
  (*block.body)();
  block.fibers[own].done = true;
  ++block.progress;
  // Others need not wait for a thread that has ended.
  --block.all.expected;
  pass_if_complete(block.all);
  --block.warps[own / 32].expected;
  pass_if_complete(block.warps[own / 32]);
  swapcontext(&block.fibers[own].context, &block.scheduler);
}

inline void run_block(unsigned threads, size_t shared, const std::function<void()>& body) {
  const char* order = std::getenv("FASTFUSE_EMULATED_ORDER");
  const bool backward = order && !std::strcmp(order, "backward");
  block.fibers.resize(threads);
  block.shuffled.resize(threads);
  block.warps.assign((threads + 31) / 32, Meeting{});
  for (unsigned t = 0; t < threads; ++t) ++block.warps[t / 32].expected;
  block.all = Meeting{};
  block.all.expected = threads;
  block.shared.assign(shared, 0xff);
  block.body = &body;
  for (Fiber& fiber : block.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  unsigned alive = threads;
  while (alive) {
    const uint64_t before = block.progress;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = backward ? threads - 1 - i : i;
      if (block.fibers[t].done) continue;
      block.current = t;
      threadIdx = dim3(t, 0, 0);
      swapcontext(&block.scheduler, &block.fibers[t].context);
      alive -= block.fibers[t].done;
    }
    if (alive && before == block.progress) {
      std::fprintf(stderr, "threads of a block wait for each other at different places\n");
      std::abort();
    }
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(emulated::block.all); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  emulated::Block& block = emulated::block;
  const unsigned own = block.current;
  std::memcpy(&block.shuffled[own], &value, sizeof(T));
  emulated::meet(block.warps[own / 32]);
  std::memcpy(&value, &block.shuffled[own ^ static_cast<unsigned>(mask)], sizeof(T));
  emulated::meet(block.warps[own / 32]);
  return value;
}

template <typename... Parameters, typename... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulated::run_block(blockDim.x, config->dynamicSmemBytes, body);
      }
  return cudaSuccess;
}
