#include "diwa/gru_gates.h"

#include "diwa/simd.h"

namespace diwa {
namespace DIWA_ISA {

using namespace simd;

// r = σ(gi_r + gh_r),  z = σ(gi_z + gh_z),  n = tanh(gi_n + r gh_n),  h' = n + z (h - n)
void gru_gates_fwd(const GruGatesArgs& a, int64_t row0, int64_t row1) {
  const int64_t H = a.H;
  for (int64_t b = row0; b < row1; ++b) {
    const float *gi = a.gi + b * 3 * H, *gh = a.gh + b * 3 * H, *h = a.h + b * H;
    float* out = a.out + b * H;
    for (int64_t c = 0; c < H; c += DIWA_W) {
      const int64_t m = H - c;
      const vf r = vsigmoid(load(gi + c, m) + load(gh + c, m));
      const vf z = vsigmoid(load(gi + H + c, m) + load(gh + H + c, m));
      const vf n = vtanh(load(gi + 2 * H + c, m) + r * load(gh + 2 * H + c, m));
      store(out + c, n + z * (load(h + c, m) - n), m);
    }
  }
}

// The gates are computed again from gi and gh: cheaper than writing and reading them.
void gru_gates_bwd(const GruGatesBwdArgs& a, int64_t row0, int64_t row1) {
  const int64_t H = a.H;
  for (int64_t b = row0; b < row1; ++b) {
    const float *gi = a.gi + b * 3 * H, *gh = a.gh + b * 3 * H, *h = a.h + b * H;
    const float* grad = a.grad + b * H;
    float *d_gi = a.d_gi + b * 3 * H, *d_gh = a.d_gh + b * 3 * H, *d_h = a.d_h + b * H;
    for (int64_t c = 0; c < H; c += DIWA_W) {
      const int64_t m = H - c;
      const vf g = load(grad + c, m), gh_n = load(gh + 2 * H + c, m);
      const vf r = vsigmoid(load(gi + c, m) + load(gh + c, m));
      const vf z = vsigmoid(load(gi + H + c, m) + load(gh + H + c, m));
      const vf n = vtanh(load(gi + 2 * H + c, m) + r * gh_n);
      const vf d_n = g * (1.f - z) * (1.f - n * n);
      const vf d_z = g * (load(h + c, m) - n) * z * (1.f - z);
      const vf d_r = d_n * gh_n * r * (1.f - r);
      store(d_gi + c, d_r, m);
      store(d_gi + H + c, d_z, m);
      store(d_gi + 2 * H + c, d_n, m);
      store(d_gh + c, d_r, m);
      store(d_gh + H + c, d_z, m);
      store(d_gh + 2 * H + c, d_n * r, m);
      store(d_h + c, g * z, m);
    }
  }
}

}  // namespace DIWA_ISA
}  // namespace diwa
