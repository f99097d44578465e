#pragma once
// Row operations of one RSSM step, for csrc/cpu/rssm_*.cpp.
#include "diwa/gemm.h"

namespace diwa {
namespace {
namespace rssm {

using namespace simd;

#define DIWA_MEMBER inline __attribute__((always_inline))

// Hands out the parts of one scratch buffer, each aligned as the buffer is (64 bytes).
struct Arena {
  float* next;
  template <class T>
  DIWA_MEMBER T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(next);
    next += (n + 15) / 16 * 16;
    return part;
  }
};

// The first n values, the rest zero: for sums over values that were computed from a row's end.
DIWA_INLINE vf first(vf v, int64_t n) {
  if (n >= DIWA_W) return v;
  float t[DIWA_W];
  store(t, v);
  return load(t, n);
}

DIWA_INLINE vf vexpm1_negative(vf x) { return vexp(vmin(set1(0.f), x)) - 1.f; }
DIWA_INLINE vf velu(vf x) { return x > 0.f ? x : vexpm1_negative(x); }

struct Moments {
  float mean, rstd;
};

// Mean and 1 / sqrt(variance + eps) of a row, in two passes.
DIWA_INLINE Moments moments(const float* x, int64_t n, float eps) {
  vf sum = {}, square = {};
  for (int64_t c = 0; c < n; c += DIWA_W) sum += load(x + c, n - c);
  const float mean = hsum(sum) / n;
  for (int64_t c = 0; c < n; c += DIWA_W) {
    const vf d = first(load(x + c, n - c) - mean, n - c);
    square += d * d;
  }
  return {mean, 1.f / __builtin_sqrtf(hsum(square) / n + eps)};
}

struct Norm {
  const float *gain, *shift;  // [n]
  float eps;
};

// put(c, v): v = ELU(LayerNorm(x)) of the values from c on.
template <class Put>
DIWA_INLINE void norm_elu(const float* x, int64_t n, const Norm& p, const Put& put) {
  const Moments s = moments(x, n, p.eps);
  for (int64_t c = 0; c < n; c += DIWA_W) {
    const int64_t m = n - c;
    put(c, velu((load(x + c, m) - s.mean) * s.rstd * load(p.gain + c, m) + load(p.shift + c, m)));
  }
}

// Gradient d_x of the above from that of the result, `grad`, and the result y itself; the gradients
// of gain and shift are added to d_gain and d_shift. `work` holds n values. grad may be d_x.
DIWA_INLINE void norm_elu_bwd(const float* grad, const float* x, const float* y, int64_t n,
                              const Norm& p, float* d_gain, float* d_shift, float* work,
                              float* d_x) {
  const Moments s = moments(x, n, p.eps);
  vf sum = {}, dot = {};
  for (int64_t c = 0; c < n; c += DIWA_W) {
    const int64_t m = n - c;
    const vf v = load(y + c, m), slope = v > 0.f ? set1(1.f) : v + 1.f;
    const vf d = load(grad + c, m) * slope;
    const vf hat = first((load(x + c, m) - s.mean) * s.rstd, m);
    store(d_shift + c, load(d_shift + c, m) + d, m);
    store(d_gain + c, load(d_gain + c, m) + d * hat, m);
    const vf g = d * load(p.gain + c, m);
    store(work + c, g, m);
    sum += g;
    dot += g * hat;
  }
  const float mean_g = hsum(sum) / n, mean_gx = hsum(dot) / n;
  for (int64_t c = 0; c < n; c += DIWA_W) {
    const int64_t m = n - c;
    const vf hat = (load(x + c, m) - s.mean) * s.rstd;
    store(d_x + c, s.rstd * (load(work + c, m) - mean_g - hat * mean_gx), m);
  }
}

// out[c] (add: +)= the sum of K rows of n values. Whole rows one after the other, a few at a time,
// are what the hardware prefetches.
template <int K>
DIWA_INLINE void add_rows(const float* const* rows, int64_t n, bool add, float* out) {
  for (int64_t c = 0; c < n; c += DIWA_W) {
    const int64_t m = n - c;
    vf sum = load(rows[0] + c, m);
#pragma GCC unroll 8
    for (int i = 1; i < K; ++i) sum += load(rows[i] + c, m);
    store(out + c, add ? load(out + c, m) + sum : sum, m);
  }
}

// out[c] = base[c] + scale * sum over groups of table[s C + index[s]][c]; index -1 gives NaN.
DIWA_INLINE void gather(const float* table, int64_t n, const int32_t* index, int64_t S, int64_t C,
                        const float* base, float scale, float* out) {
  constexpr int kRows = 8;
  const float* rows[kRows];
  int64_t s = 0;
  for (; s + kRows <= S; s += kRows) {
    for (int i = 0; i < kRows; ++i) {
      const int32_t k = index[s + i];
      if (k < 0) scale = __builtin_nanf("");
      rows[i] = table + ((s + i) * C + (k < 0 ? 0 : k)) * n;
    }
    add_rows<kRows>(rows, n, s > 0, out);
  }
  for (; s < S; ++s) {
    if (index[s] < 0) scale = __builtin_nanf("");
    rows[0] = table + (s * C + (index[s] < 0 ? 0 : index[s])) * n;
    add_rows<1>(rows, n, s > 0, out);
  }
  for (int64_t c = 0; c < n; c += DIWA_W) {
    const int64_t m = n - c;
    store(out + c, load(base + c, m) + scale * load(out + c, m), m);
  }
}

// e[c] = exp((logits[c] - max) * sharpness) for one group; returns their sum. NaN comes out as NaN.
DIWA_INLINE float exponentials(const float* logits, int64_t C, float sharpness, float* e) {
  vf high = set1(-__builtin_inff());
  int64_t c = 0;
  for (; c + DIWA_W <= C; c += DIWA_W) high = vmax(high, load(logits + c));
  float max = -__builtin_inff();
  for (int i = 0; i < DIWA_W; ++i) max = high[i] > max ? high[i] : max;
  for (; c < C; ++c) max = logits[c] > max ? logits[c] : max;
  vf sum = {};
  for (c = 0; c < C; c += DIWA_W) {
    const int64_t m = C - c;
    const vf x = (load(logits + c, m) - max) * sharpness;
    const vf v = first(x < -87.f ? (vf){} : vexp(x), m);  // a class at -inf is never drawn
    store(e + c, v, m);
    sum += v;
  }
  return hsum(sum);
}

// Inverse CDF of one group: the number of cumulative probabilities <= u, at most C - 1; -1 if the
// probabilities are NaN. `e` and `total` come from `exponentials`.
DIWA_INLINE int32_t draw(const float* e, float total, int64_t C, float unimix, float u) {
  if (!(total == total)) return -1;
  const float threshold = u * total, share = unimix * total / C, rest = 1.f - unimix;
  float sum = 0;
  int64_t c = 0;
  for (; c < C - 1; ++c) {
    sum += rest * e[c] + share;
    if (!(sum <= threshold)) break;
  }
  return static_cast<int32_t>(c);
}

// One-hot of a group, NaN for the index -1.
DIWA_INLINE void onehot(int32_t index, int64_t C, float* z) {
  const float fill = index < 0 ? __builtin_nanf("") : 0.f;
  for (int64_t c = 0; c < C; ++c) z[c] = fill;
  if (index >= 0) z[index] = 1.f;
}

// Gates of a GRU and its new state, of the values from c on: s (reset), z (update), n, and the
// part hn of n that the state before contributes.
struct Gates {
  vf s, z, n, hn, h;
};

// put(c, m, gates) for a state of H values; i and j are the products of the input and of the state
// with their weights, `old * keep` is the state before.
template <class Put>
DIWA_INLINE void gru(const float* i, const float* j, const float* b_ih, const float* b_hh,
                     const float* old, float keep, int64_t H, const Put& put) {
  for (int64_t c = 0; c < H; c += DIWA_W) {
    const int64_t m = H - c;
    const auto sum = [&](const float* v, const float* bias, int64_t gate) {
      return load(v + gate * H + c, m) + load(bias + gate * H + c, m);
    };
    Gates g;
    g.s = vsigmoid(sum(i, b_ih, 0) + sum(j, b_hh, 0));
    g.z = vsigmoid(sum(i, b_ih, 1) + sum(j, b_hh, 1));
    g.hn = sum(j, b_hh, 2);
    g.n = vtanh(sum(i, b_ih, 2) + g.s * g.hn);
    g.h = g.n + g.z * (load(old + c, m) * keep - g.n);
    put(c, m, g);
  }
}

// n values of a row, times `scale`, as the activations of a GEMM; an odd n ends with a zero.
template <bool BF>
DIWA_INLINE void activate(const float* x, int64_t n, float scale,
                          typename gemm::Act<BF>::type* out) {
  for (int64_t c = 0; c < n; c += DIWA_W)
    gemm::Act<BF>::store(out + c, first(load(x + c, n - c) * scale, n - c));
}

}  // namespace rssm
}  // namespace
}  // namespace diwa
