// What the kernels of the first part of concat_fuse share, forward and backward: depthwise 3x3, batch norm, ReLU, of
// all maps of all modules of a call.
//
// Maps in which a channel is contiguous (concat_fuse_channels.cuh): one block per channel holds the channel's whole
// batch in shared memory, so that stencil, statistics, normalisation and ReLU are one launch, and so is their backward.
// Where it does not fit, the block reads the channel again from memory. Channels-last maps (concat_fuse_tiles.cuh):
// blocks of 32 or 64 channels and a share of the positions; every block merges the moments of all shares in the same
// order.
// See fastfuse/kernels/concat_fuse/README.md.
#pragma once

#include "common.cuh"

namespace fastfuse {

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

__device__ inline int spatial(const Call& call) { return call.height * call.width; }

// The weights of a channel of a module.
__device__ inline void load_taps(const Module& module, int channel, float* taps) {
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
__device__ inline void keep_statistics(const Module& module, int channel, const Moments& all) {
  const float momentum = module.momentum, var = all.squares / all.count;
  module.statistics[channel] = all.mean;
  module.statistics[module.channels + channel] = var;
  module.mean.put(channel, (1 - momentum) * module.mean.get(channel) + momentum * all.mean);
  module.var.put(channel, (1 - momentum) * module.var.get(channel) + momentum * (all.squares / (all.count - 1)));
}

// Whether the neighbour at tap i of a position lies in the map, and how many positions away it is.
__device__ inline bool reaches(const Call& call, int row, int column, int i) {
  const int r = row + i / 3 - 1, c = column + i % 3 - 1;
  return r >= 0 && r < call.height && c >= 0 && c < call.width;
}
__device__ inline int step(const Call& call, int i) { return (i / 3 - 1) * call.width + i % 3 - 1; }

}  // namespace fastfuse
