#pragma once
// Mish and its slope with one exponential, for csrc/cpu/*.cpp.
#include "diwa/simd.h"

namespace diwa {
namespace {
namespace simd {

// e^x, at most e^20, where mish x = x already in float32 and e^4x is still finite; zero where vexp
// saturates, so that x e^x is zero for every large -x.
DIWA_INLINE vf mish_exp(vf x) {
  const vf e = vexp(vmin(set1(20.f), x));
  return x < -87.f ? (vf){} : e;
}

// With e = e^x and n = e² + 2e:  tanh(softplus x) = n / (n + 2),  mish x = x n / (n + 2).
DIWA_INLINE vf vmish(vf x) {
  const vf e = mish_exp(x), n = e * (e + 2.f);
  return x * (n / (n + 2.f));
}

// mish' x = n / (n + 2) + 4 x e (e + 1) / (n + 2)², over one denominator to divide once.
DIWA_INLINE vf vmish_slope(vf x) {
  const vf e = mish_exp(x), n = e * (e + 2.f), d = n + 2.f;
  return (n * d + vmin(set1(20.f), x) * (4.f * e * (e + 1.f))) / (d * d);
}

}  // namespace simd
}  // namespace
}  // namespace diwa
