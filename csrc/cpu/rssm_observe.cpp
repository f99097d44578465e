#include "diwa/rssm_observe.h"

#include "diwa/rssm_rows.h"

namespace diwa {
namespace DIWA_ISA {

using namespace simd;
using namespace rssm;

namespace {

template <bool BF>
struct Forward {
  typedef typename gemm::Act<BF>::type act;
  const RSSMObserveArgs& p;
  const int64_t row0, R, lu, lh, lg, G = 3 * p.H, Z = p.S * p.C;
  Arena arena;
  act* const u = arena.take<act>(R * lu);
  act* const h = arena.take<act>(R * lh);
  float* const gi = arena.take<float>(R * lg);
  float* const gh = arena.take<float>(R * lg);
  float* const strip = arena.take<float>(R * gemm::kStrip);
  float* const e = arena.take<float>(p.C);
  int32_t* const index = arena.take<int32_t>(R * p.S);

  inline __attribute__((always_inline)) Forward(const RSSMObserveArgs& a, int64_t r0, int64_t r1,
                                                float* scratch)
      : p(a),
        row0(r0),
        R(r1 - r0),
        lu(gemm::stride(a.U)),
        lh(gemm::stride(a.H)),
        lg(gemm::stride(3 * a.H)),
        arena{scratch} {}

  // Row r of frame t in the tensors kept for every frame, and in those kept for the backward pass.
  DIWA_MEMBER int64_t at(int64_t t, int64_t r) const { return t * p.B + row0 + r; }
  DIWA_MEMBER int64_t kept(int64_t t, int64_t r) const { return at(p.saved == 1 ? 0 : t, r); }
  DIWA_MEMBER const float* before(int64_t t, int64_t r) const {
    return t ? p.h + at(t - 1, r) * p.H : p.h0 + (row0 + r) * p.H;
  }

  DIWA_MEMBER void layer(const float* x, const Norm& norm, float* result, act* next) const {
    norm_elu(x, p.U, norm, [&](int64_t c, vf v) {
      store(result + c, v, p.U - c);
      gemm::Act<BF>::store(next + c, first(v, p.U - c));
    });
  }

  DIWA_MEMBER void inputs(int64_t t, int64_t r) const {
    const float keep = p.keep[at(t, r)], *action = p.action + at(t, r) * p.U;
    float* x = p.x + kept(t, r) * p.U;
    if (t) {
      gather(p.table, p.U, index + r * p.S, p.S, p.C, action, keep, x);
    } else {
      const float* z = p.first + (row0 + r) * p.U;
      for (int64_t c = 0; c < p.U; ++c) x[c] = action[c] + z[c];
    }
    layer(x, {p.cell_gain, p.cell_shift, p.eps}, p.a + kept(t, r) * p.U, u + r * lu);
    activate<BF>(before(t, r), p.H, keep, h + r * lh);
  }

  DIWA_MEMBER void gates(int64_t t, int64_t r) const {
    const int64_t H = p.H;
    float *out = p.h + at(t, r) * H, *saved = p.gates + kept(t, r) * 4 * H;
    gru(gi + r * lg, gh + r * lg, p.b_ih, p.b_hh, before(t, r), p.keep[at(t, r)], H,
        [&](int64_t c, int64_t m, const Gates& g) {
          store(out + c, g.h, m);
          store(saved + c, g.s, m);
          store(saved + H + c, g.z, m);
          store(saved + 2 * H + c, g.n, m);
          store(saved + 3 * H + c, g.hn, m);
        });
    activate<BF>(out, H, 1.f, h + r * lh);
  }

  DIWA_MEMBER void sample(int64_t t, int64_t r) const {
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t where = at(t, r) * Z + s * p.C;
      const float total = exponentials(p.logits + where, p.C, 1.f, e);
      const int32_t k = draw(e, total, p.C, p.unimix, p.uniform[at(t, r) * p.S + s]);
      index[r * p.S + s] = k;
      onehot(k, p.C, p.z + where);
    }
  }

  DIWA_MEMBER void frame(int64_t t) const {
    for (int64_t r = 0; r < R; ++r) inputs(t, r);
    gemm::run<BF>(gemm::weight<BF>(p.w_ih, G, p.U), u, lu, R, strip,
                  [&](int64_t m, int64_t n, vf v) { store(gi + m * lg + n, v); });
    gemm::run<BF>(gemm::weight<BF>(p.w_hh, G, p.H), h, lh, R, strip,
                  [&](int64_t m, int64_t n, vf v) { store(gh + m * lg + n, v); });
    for (int64_t r = 0; r < R; ++r) gates(t, r);
    gemm::run<BF>(gemm::weight<BF>(p.head, p.U, p.H), h, lh, R, strip,
                  [&](int64_t m, int64_t n, vf v) {
                    const float* embed = p.embed + at(t, m) * p.U;
                    store(p.y + kept(t, m) * p.U + n, v + load(embed + n, p.U - n), p.U - n);
                  });
    for (int64_t r = 0; r < R; ++r)
      layer(p.y + kept(t, r) * p.U, {p.head_gain, p.head_shift, p.eps}, p.b + kept(t, r) * p.U,
            u + r * lu);
    gemm::run<BF>(gemm::weight<BF>(p.out, Z, p.U), u, lu, R, strip,
                  [&](int64_t m, int64_t n, vf v) {
                    store(p.logits + at(t, m) * Z + n, v + load(p.out_bias + n, Z - n), Z - n);
                  });
    for (int64_t r = 0; r < R; ++r) sample(t, r);
  }
};

template <bool BF>
struct Backward {
  typedef typename gemm::Act<BF>::type act;
  const RSSMObserveBwdArgs& p;
  const int64_t row0, R, lw, lu, lh, lz, G = 3 * p.H, Z = p.S * p.C;
  Arena arena;
  act* const w = arena.take<act>(R * lw);
  float* const d = arena.take<float>(R * lu);
  float* const dh = arena.take<float>(R * lh);
  float* const dz = arena.take<float>(R * lz);
  float* const strip = arena.take<float>(R * gemm::kStrip);
  float* const work = arena.take<float>(p.U);
  float* const e = arena.take<float>(p.C);

  inline __attribute__((always_inline)) Backward(const RSSMObserveBwdArgs& a, int64_t r0,
                                                 int64_t r1, float* scratch)
      : p(a),
        row0(r0),
        R(r1 - r0),
        lw(gemm::stride(rssm_widest(a.H, a.U, a.S * a.C) + 1)),
        lu(gemm::stride(a.U)),
        lh(gemm::stride(a.H)),
        lz(gemm::stride(a.S * a.C)),
        arena{scratch} {}

  DIWA_MEMBER int64_t at(int64_t t, int64_t r) const { return t * p.B + row0 + r; }

  // Gradient of the logits: d_i = g_i + (1 - unimix) p_i (d_z,i - sum_j p_j d_z,j).
  DIWA_MEMBER void sample(int64_t t, int64_t r) const {
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t where = at(t, r) * Z + s * p.C;
      const float *g = p.g_z + where, *carried = dz + r * lz + s * p.C;
      const float scale = 1.f / exponentials(p.logits + where, p.C, 1.f, e);
      vf dot = {};
      for (int64_t c = 0; c < p.C; c += DIWA_W) {
        const int64_t m = p.C - c;
        dot += load(e + c, m) * (load(g + c, m) + load(carried + c, m));
      }
      const float mean = hsum(dot) * scale, rest = (1.f - p.unimix) * scale;
      for (int64_t c = 0; c < p.C; c += DIWA_W) {
        const int64_t m = p.C - c;
        const vf v = load(g + c, m) + load(carried + c, m) - mean;
        store(p.d_logits + where + c, load(p.g_logits + where + c, m) + rest * load(e + c, m) * v,
              m);
      }
    }
    activate<BF>(p.d_logits + at(t, r) * Z, Z, 1.f, w + r * lw);
  }

  DIWA_MEMBER void gates(int64_t t, int64_t r) const {
    const int64_t H = p.H;
    const float keep = p.keep[at(t, r)];
    const float* old = t ? p.h + at(t - 1, r) * H : p.h0 + (row0 + r) * H;
    const float* saved = p.gates + at(t, r) * 4 * H;
    float *out = p.d_gates + at(t, r) * 4 * H, *g = dh + r * lh;
    for (int64_t c = 0; c < H; c += DIWA_W) {
      const int64_t m = H - c;
      const vf s = load(saved + c, m), z = load(saved + H + c, m), n = load(saved + 2 * H + c, m);
      const vf grad = load(g + c, m), d_n = grad * (1.f - z) * (1.f - n * n);
      store(out + c, d_n, m);
      store(out + H + c, d_n * load(saved + 3 * H + c, m) * s * (1.f - s), m);
      store(out + 2 * H + c, grad * (load(old + c, m) * keep - n) * z * (1.f - z), m);
      store(out + 3 * H + c, d_n * s, m);
      store(g + c, grad * z, m);
    }
    activate<BF>(out, 4 * H, 1.f, w + r * lw);
    w[r * lw + 4 * H] = {};
  }

  DIWA_MEMBER void layer(int64_t t, int64_t r, const float* x, const float* y, const Norm& norm,
                         float* d_norm, float* d_x) const {
    const int64_t row = at(t, r) * p.U;
    norm_elu_bwd(d + r * lu, x + row, y + row, p.U, norm, d_norm, d_norm + p.U, work, d_x + row);
    activate<BF>(d_x + row, p.U, 1.f, w + r * lw);
  }

  DIWA_MEMBER void frame(int64_t t) const {
    const auto to_d = [&](int64_t m, int64_t n, vf v) { store(d + m * lu + n, v); };
    for (int64_t r = 0; r < R; ++r) sample(t, r);
    gemm::run<BF>(gemm::weight<BF>(p.out_t, p.U, Z), w, lw, R, strip, to_d);
    for (int64_t r = 0; r < R; ++r)
      layer(t, r, p.y, p.b, {p.head_gain, p.head_shift, p.eps},
            p.d_norms + (row0 + r) * 4 * p.U + 2 * p.U, p.d_y);
    gemm::run<BF>(gemm::weight<BF>(p.head_t, p.H, p.U), w, lw, R, strip,
                  [&](int64_t m, int64_t n, vf v) {
                    float* g = dh + m * lh + n;
                    store(g, load(g) + v + load(p.g_h + at(t, m) * p.H + n, p.H - n));
                  });
    for (int64_t r = 0; r < R; ++r) gates(t, r);
    gemm::run<BF>(gemm::weight<BF>(p.w_hh_t, p.H, G), w + p.H, lw, R, strip,
                  [&](int64_t m, int64_t n, vf v) {
                    float* g = dh + m * lh + n;
                    store(g, p.keep[at(t, m)] * (load(g) + v));
                  });
    gemm::run<BF>(gemm::weight<BF>(p.w_ih_t, p.U, G), w, lw, R, strip, to_d);
    for (int64_t r = 0; r < R; ++r)
      layer(t, r, p.x, p.a, {p.cell_gain, p.cell_shift, p.eps}, p.d_norms + (row0 + r) * 4 * p.U,
            p.d_x);
    gemm::run<BF>(
        gemm::weight<BF>(p.cell_zt, Z, p.U), w, lw, R, strip,
        [&](int64_t m, int64_t n, vf v) { store(dz + m * lz + n, p.keep[at(t, m)] * v); });
  }
};

template <bool BF>
DIWA_INLINE void forward(const RSSMObserveArgs& args, int64_t row0, int64_t row1, float* scratch) {
  const Forward<BF> rows(args, row0, row1, scratch);
  for (int64_t t = 0; t < args.T; ++t) rows.frame(t);
}

template <bool BF>
DIWA_INLINE void backward(const RSSMObserveBwdArgs& args, int64_t row0, int64_t row1,
                          float* scratch) {
  const Backward<BF> rows(args, row0, row1, scratch);
  for (int64_t i = 0; i < rows.R * rows.lh; ++i) rows.dh[i] = 0;
  for (int64_t i = 0; i < rows.R * rows.lz; ++i) rows.dz[i] = 0;
  for (int64_t t = args.T; t-- > 0;) rows.frame(t);
  for (int64_t r = 0; r < rows.R; ++r) {
    const int64_t b = row0 + r;
    __builtin_memcpy(args.d_h0 + b * args.H, rows.dh + r * rows.lh, args.H * sizeof(float));
    __builtin_memcpy(args.d_z0 + b * rows.Z, rows.dz + r * rows.lz, rows.Z * sizeof(float));
  }
}

}  // namespace

void rssm_observe_fwd_f32(const RSSMObserveArgs& args, int64_t row0, int64_t row1, float* scratch) {
  forward<false>(args, row0, row1, scratch);
}

void rssm_observe_fwd_bf16(const RSSMObserveArgs& args, int64_t row0, int64_t row1,
                           float* scratch) {
  forward<true>(args, row0, row1, scratch);
}

void rssm_observe_bwd_f32(const RSSMObserveBwdArgs& args, int64_t row0, int64_t row1,
                          float* scratch) {
  backward<false>(args, row0, row1, scratch);
}

void rssm_observe_bwd_bf16(const RSSMObserveBwdArgs& args, int64_t row0, int64_t row1,
                           float* scratch) {
  backward<true>(args, row0, row1, scratch);
}

}  // namespace DIWA_ISA
}  // namespace diwa
