#include "diwa/rssm_imagine.h"

#include "diwa/rssm_rows.h"

namespace diwa {
namespace DIWA_ISA {

using namespace simd;
using namespace rssm;

namespace {

template <bool BF>
struct Rows {
  typedef typename gemm::Act<BF>::type act;
  const RSSMImagineArgs& p;
  const int64_t row0, R, lu, lh, lg, lz, G = 3 * p.H, Z = p.S * p.C;
  Arena arena;
  act* const u = arena.take<act>(R * lu);
  act* const h = arena.take<act>(R * lh);
  float* const x = arena.take<float>(R * lu);
  float* const gi = arena.take<float>(R * lg);
  float* const gh = arena.take<float>(R * lg);
  float* const logits = arena.take<float>(R * lz);
  float* const strip = arena.take<float>(R * gemm::kStrip);
  float* const base = arena.take<float>(p.U);
  float* const e = arena.take<float>(p.C);
  int32_t* const index = arena.take<int32_t>(R * p.S);

  DIWA_MEMBER Rows(const RSSMImagineArgs& a, int64_t r0, int64_t r1, float* scratch)
      : p(a),
        row0(r0),
        R(r1 - r0),
        lu(gemm::stride(a.U)),
        lh(gemm::stride(a.H)),
        lg(gemm::stride(3 * a.H)),
        lz(gemm::stride(a.S * a.C)),
        arena{scratch} {
    for (int64_t i = 0; i < R * p.S; ++i) index[i] = static_cast<int32_t>(p.z0[row0 * p.S + i]);
    for (int64_t r = 0; r < R; ++r) activate<BF>(p.h0 + (row0 + r) * p.H, p.H, 1.f, h + r * lh);
  }

  DIWA_MEMBER int64_t at(int64_t l, int64_t r) const { return l * p.N + row0 + r; }

  DIWA_MEMBER void layer(int64_t r, const Norm& norm) const {
    norm_elu(x + r * lu, p.U, norm,
             [&](int64_t c, vf v) { gemm::Act<BF>::store(u + r * lu + c, first(v, p.U - c)); });
  }

  DIWA_MEMBER void inputs(int64_t l, int64_t r) const {
    const float* action = p.actions + at(l, r) * p.A;
    for (int64_t c = 0; c < p.U; c += DIWA_W) {
      const int64_t m = p.U - c;
      vf sum = load(p.cell_bias + c, m);
      for (int64_t i = 0; i < p.A; ++i) sum += action[i] * load(p.cell_a + i * p.U + c, m);
      store(base + c, sum, m);
    }
    gather(p.table, p.U, index + r * p.S, p.S, p.C, base, 1.f, x + r * lu);
    layer(r, {p.cell_gain, p.cell_shift, p.eps});
  }

  DIWA_MEMBER void gates(int64_t l, int64_t r) const {
    const int64_t H = p.H;
    const float* old = l ? p.h + at(l - 1, r) * H : p.h0 + (row0 + r) * H;
    float* out = p.h + at(l, r) * H;
    gru(gi + r * lg, gh + r * lg, p.b_ih, p.b_hh, old, 1.f, H,
        [&](int64_t c, int64_t m, const Gates& g) { store(out + c, g.h, m); });
    activate<BF>(out, H, 1.f, h + r * lh);
  }

  DIWA_MEMBER void sample(int64_t l, int64_t r) const {
    const int64_t row = at(l, r);
    float* feature = p.features ? p.features + row * (p.H + Z) : nullptr;
    if (feature) __builtin_memcpy(feature, p.h + row * p.H, p.H * sizeof(float));
    for (int64_t s = 0; s < p.S; ++s) {
      const float total = exponentials(logits + r * lz + s * p.C, p.C, p.sharpness, e);
      const int32_t k = draw(e, total, p.C, p.unimix, p.uniforms[row * p.S + s]);
      index[r * p.S + s] = k;
      p.z[row * p.S + s] = k;
      if (feature) onehot(k, p.C, feature + p.H + s * p.C);
    }
  }

  DIWA_MEMBER void step(int64_t l) const {
    for (int64_t r = 0; r < R; ++r) inputs(l, r);
    gemm::run<BF>(gemm::weight<BF>(p.w_ih, G, p.U), u, lu, R, strip,
                  [&](int64_t m, int64_t n, vf v) { store(gi + m * lg + n, v); });
    gemm::run<BF>(gemm::weight<BF>(p.w_hh, G, p.H), h, lh, R, strip,
                  [&](int64_t m, int64_t n, vf v) { store(gh + m * lg + n, v); });
    for (int64_t r = 0; r < R; ++r) gates(l, r);
    gemm::run<BF>(gemm::weight<BF>(p.head, p.U, p.H), h, lh, R, strip,
                  [&](int64_t m, int64_t n, vf v) {
                    store(x + m * lu + n, v + load(p.head_bias + n, p.U - n));
                  });
    for (int64_t r = 0; r < R; ++r) layer(r, {p.head_gain, p.head_shift, p.eps});
    gemm::run<BF>(gemm::weight<BF>(p.out, Z, p.U), u, lu, R, strip,
                  [&](int64_t m, int64_t n, vf v) {
                    store(logits + m * lz + n, v + load(p.out_bias + n, Z - n));
                  });
    for (int64_t r = 0; r < R; ++r) sample(l, r);
  }
};

template <bool BF>
DIWA_INLINE void imagine(const RSSMImagineArgs& args, int64_t row0, int64_t row1, float* scratch) {
  const Rows<BF> rows(args, row0, row1, scratch);
  for (int64_t l = 0; l < args.L; ++l) rows.step(l);
}

}  // namespace

void rssm_imagine_f32(const RSSMImagineArgs& args, int64_t row0, int64_t row1, float* scratch) {
  imagine<false>(args, row0, row1, scratch);
}

void rssm_imagine_bf16(const RSSMImagineArgs& args, int64_t row0, int64_t row1, float* scratch) {
  imagine<true>(args, row0, row1, scratch);
}

}  // namespace DIWA_ISA
}  // namespace diwa
