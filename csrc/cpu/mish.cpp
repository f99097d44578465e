#include "diwa/mish.h"

#include "diwa/activation.h"

namespace diwa {
namespace DIWA_ISA {

using namespace simd;

void mish_fwd(const MishArgs& a, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; i += DIWA_W) {
    const int64_t m = i1 - i;
    store(a.out + i, vmish(load(a.x + i, m)), m);
  }
}

void mish_bwd(const MishBwdArgs& a, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; i += DIWA_W) {
    const int64_t m = i1 - i;
    store(a.d_x + i, load(a.grad + i, m) * vmish_slope(load(a.x + i, m)), m);
  }
}

}  // namespace DIWA_ISA
}  // namespace diwa
