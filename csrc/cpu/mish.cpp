#include "diwa/mish.h"

#include "diwa/simd.h"

namespace diwa {
namespace DIWA_ISA {

using namespace simd;

// e^x, at most e^20, where mish x = x already in float32 and e^4x is still finite; zero where vexp
// saturates, so that x e^x is zero for every large -x.
DIWA_INLINE vf mish_exp(vf x) {
  const vf e = vexp(vmin(set1(20.f), x));
  return x < -87.f ? (vf){} : e;
}

// With e = e^x and n = e² + 2e:  tanh(softplus x) = n / (n + 2),  mish x = x n / (n + 2).
void mish_fwd(const MishArgs& a, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; i += DIWA_W) {
    const int64_t m = i1 - i;
    const vf x = load(a.x + i, m), e = mish_exp(x), n = e * (e + 2.f);
    store(a.out + i, x * (n / (n + 2.f)), m);
  }
}

// mish' x = n / (n + 2) + 4 x e (e + 1) / (n + 2)², over one denominator to divide once.
void mish_bwd(const MishBwdArgs& a, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; i += DIWA_W) {
    const int64_t m = i1 - i;
    const vf x = load(a.x + i, m), e = mish_exp(x), n = e * (e + 2.f), d = n + 2.f;
    const vf slope = (n * d + vmin(set1(20.f), x) * (4.f * e * (e + 1.f))) / (d * d);
    store(a.d_x + i, load(a.grad + i, m) * slope, m);
  }
}

}  // namespace DIWA_ISA
}  // namespace diwa
