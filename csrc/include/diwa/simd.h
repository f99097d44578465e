#pragma once
// A small SIMD layer on GCC/Clang vector extensions, for csrc/cpu/*.cpp only.
// Everything is always_inline in an unnamed namespace: a function compiled for one instruction set
// must never be the copy the linker keeps for another. For the same reason kernel files use no
// std:: function and no template that could be emitted out of line.
// NaN: min, max and the functions below return NaN when x is NaN.
#include <cstdint>

#if defined(__AVX512F__)
#define DIWA_W 16  // floats per vector
#elif defined(__AVX2__)
#define DIWA_W 8
#else
#define DIWA_W 4
#endif
#define DIWA_INLINE static inline __attribute__((always_inline))

namespace diwa {
namespace {
namespace simd {

typedef float vf __attribute__((vector_size(DIWA_W * 4)));
typedef int32_t vi __attribute__((vector_size(DIWA_W * 4)));

DIWA_INLINE vf set1(float x) { return x - (vf){}; }

DIWA_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

DIWA_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n (0..DIWA_W) floats; the rest of the vector is zero. Lets the end of a row run through
// the same arithmetic as its middle.
DIWA_INLINE vf load(const float* p, int64_t n) {
  if (n >= DIWA_W) return load(p);
  float t[DIWA_W] = {};
  for (int64_t i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
}

DIWA_INLINE void store(float* p, vf v, int64_t n) {
  if (n >= DIWA_W) return store(p, v);
  float t[DIWA_W];
  store(t, v);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}

// The bound comes first in the comparison, so that NaN in x is kept.
DIWA_INLINE vf vmin(vf bound, vf x) { return bound < x ? bound : x; }
DIWA_INLINE vf vmax(vf bound, vf x) { return bound > x ? bound : x; }

DIWA_INLINE float hsum(vf v) {
  float s = 0;
  for (int i = 0; i < DIWA_W; ++i) s += v[i];
  return s;
}

// e^x to about 1 ulp in [-87.3, 88.3], saturating outside. Reduction to [-ln2/2, ln2/2], then the
// Cephes expf polynomial.
DIWA_INLINE vf vexp(vf x) {
  x = vmin(set1(88.37f), vmax(set1(-87.33f), x));
  const float magic = 12582912.f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const vf n = (x * 1.44269504f + magic) - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

DIWA_INLINE vf vsigmoid(vf x) { return 1.f / (1.f + vexp(-x)); }

// tanh x: an odd polynomial (Cephes tanhf) near zero, where 1 - 2/(e^2x + 1) would cancel.
DIWA_INLINE vf vtanh(vf x) {
  const vf q = x * x;
  vf p = set1(-5.70498872745e-3f);
  p = p * q + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  const vf near = p * q * x + x;
  const vf far = 1.f - 2.f / (vexp(x + x) + 1.f);
  return q < 0.390625f ? near : far;  // |x| < 0.625
}

}  // namespace simd
}  // namespace
}  // namespace diwa
