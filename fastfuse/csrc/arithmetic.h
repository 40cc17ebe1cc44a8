// Arithmetic that kernels and a test on the host share; plain C++ for any compiler.
#pragma once

#include <cmath>
#include <cstring>

#ifdef __CUDACC__
#define SHARED_CODE __host__ __device__ __forceinline__
#else
#define SHARED_CODE inline
#endif

namespace fastfuse {

// Count, mean and sum of squared differences from the mean of some values. Sums of squares would cancel in float32.
struct Moments {
  float count = 0, mean = 0, squares = 0;
};

// One more value, by Welford's update.
SHARED_CODE void add(Moments& own, float value) {
  own.count += 1;
  const float apart = value - own.mean;
  own.mean += apart / own.count;
  own.squares += apart * (value - own.mean);
}

// The values of both, by Chan's formula.
SHARED_CODE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0) return a;
  const float apart = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + apart * share, a.squares + b.squares + apart * apart * a.count * share};
}

// What divides a map by its norm, as torch.nn.functional.normalize does.
SHARED_CODE float normaliser(float norm) { return 1.0f / fmaxf(norm, 1e-12f); }

// A product that is rounded before it is added to anything: in a fused multiply-add, terms that cancel leave a residue.
SHARED_CODE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  volatile float product = a * b;
  return product;
#endif
}

// Derivative of mean_n (ah - th)^2 with respect to one value of the map a, where ah = a / |a|, th = t / |t| and
// dot = sum ah (ah - th): 2 (e - dot ah) / (N |a|), 0 for a map without a direction.
SHARED_CODE float distance_slope(
    float own, float other, float own_norm, float other_norm, float dot, int positions) {
  if (own_norm < 1e-12f) return 0;
  const float a = rounded_product(own, normaliser(own_norm)), t = rounded_product(other, normaliser(other_norm));
  return 2.0f / (own_norm * static_cast<float>(positions)) * (a - t - rounded_product(dot, a));
}

// Gradient of the input of a batch norm from that of its output: x is the standardised value; the sums are those of the
// output's gradients and of gradient times x over `count` values, both zero where running statistics were used.
SHARED_CODE float norm_slope(
    float gradient, float x, float sum, float sum_x, float count, float weight, float inverse) {
  return (gradient - (sum + x * sum_x) / count) * (weight * inverse);
}

// A number that orders as the value does, as an unsigned integer.
SHARED_CODE unsigned ordered_bits(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

SHARED_CODE float value_of(unsigned ordered) {
  const unsigned bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The k-th smallest (from 1) of some values, each bit in turn: the largest number that fewer than k of them are below.
// `count_below` tells how many values have ordered bits below a number.
template <typename F>
SHARED_CODE float kth_smallest(int k, F&& count_below) {
  unsigned found = 0;
  for (unsigned bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (count_below(found | bit) < k) found |= bit;
  }
  return value_of(found);
}

// The target of the diversity loss: half + (half - value) above the threshold, value below it, half at it.
SHARED_CODE float shifted(float value, float threshold, float half) {
  const float sign = static_cast<float>(value > threshold) - static_cast<float>(value < threshold);
  return (half - value) * sign + half;
}

}  // namespace fastfuse
