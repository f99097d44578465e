#pragma once
// GEMM on packed weights, for csrc/cpu/*.cpp: sum_k a[m, k] w[n, k], then an epilogue.
//
// Weights are packed once (diwa/ops/packing.py), in one layout for every instruction set: panels of
// 16 outputs, N rounded up to 32 outputs with zeros,
//   float32   [N / 16][K][16]
//   bfloat16  [N / 16][ceil(K / 2)][16][2]   consecutive k side by side, as vdpbf16ps takes them
// Activations are rows of Act<BF>::type, written by Act<BF>::store, `stride(K)` values apart. With
// bfloat16 weights (BF) they are rounded to bfloat16, and an odd K needs a zero after its last
// value.
//
//   gemm::run<BF>(weight, a, lda, M, strip, [&](int64_t m, int64_t n, vf sum) { ... });
//
// calls the epilogue for every row m and vector of outputs n .. n + DIWA_W - 1. Outputs from N on,
// up to the next multiple of 32, are zero: store them in a row of stride(N) values, or pass N - n
// to simd::store. `strip` is scratch of M kStrip floats. part<BF>(weight, k0, k1) is the share
// of a weight that multiplies activations k0 <= k < k1, so that a long K need not be held at once.
//
// Accuracy: 256 values of k are summed in registers, these sums are added in memory. One sum over
// all of K would have an error that grows with the square root of K.
#include "diwa/gemm_layout.h"
#include "diwa/simd.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace diwa {
namespace {
namespace gemm {

using simd::vf;
using simd::vi;

constexpr int64_t kPanel = 16;         // outputs of a panel
constexpr int64_t kLine = 64;          // bytes of a step of a panel, both in float32 and bfloat16
constexpr int64_t kCols = 2 * DIWA_W;  // outputs of a register tile, at most kStrip
#if DIWA_W == 16
constexpr int kRows = 14;  // 28 of 32 registers hold sums
#elif DIWA_W == 8
constexpr int kRows = 6;  // 12 of 16
#else
constexpr int kRows = 4;  // 8 of 16
#endif

constexpr int kStream = 1024;  // bytes that a product with few rows, bound by reading, reads ahead

struct Weight {
  const void* data;
  int64_t N, K;
  int64_t panel;  // bytes from one panel to the next
};

DIWA_INLINE int64_t even(int64_t k) { return k + (k & 1); }

template <bool BF>
DIWA_INLINE Weight weight(const void* packed, int64_t N, int64_t K) {
  return {packed, N, K, (BF ? 2 * even(K) : 4 * K) * kPanel};
}

// k0 must be even.
template <bool BF>
DIWA_INLINE Weight part(const Weight& w, int64_t k0, int64_t k1) {
  return {static_cast<const char*>(w.data) + k0 * kPanel * (BF ? 2 : 4), w.N, k1 - k0, w.panel};
}

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
DIWA_INLINE vf round_bf16(vf x) {
  vi bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & -0x10000;
  vf rounded;
  __builtin_memcpy(&rounded, &bits, sizeof rounded);
  return x == x ? rounded : x;
}

template <bool BF>
struct Act {
  typedef float type;
  DIWA_INLINE void store(float* p, vf x) { simd::store(p, BF ? round_bf16(x) : x); }
};

#ifdef __AVX512BF16__
template <>
struct Act<true> {
  typedef uint16_t type;
  DIWA_INLINE void store(uint16_t* p, vf x) {
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    __builtin_memcpy(p, &half, sizeof half);
  }
};
#endif

// The product of one row's values at step k and the weights of step k, added to the sums. A step is
// one k in float32 and two in bfloat16.
template <bool BF>
struct Step;

template <>
struct Step<false> {
  static constexpr int kWidth = 1;
  vf w0, w1;
  inline __attribute__((always_inline)) Step(const char* b0, const char* b1, int64_t k)
      : w0(simd::load(reinterpret_cast<const float*>(b0) + k * kPanel)),
        w1(simd::load(reinterpret_cast<const float*>(b1) + k * kPanel)) {}
  inline __attribute__((always_inline)) void add(const float* a, vf& c0, vf& c1) const {
    const vf x = simd::set1(*a);
    c0 += x * w0;
    c1 += x * w1;
  }
};

#ifdef __AVX512BF16__
template <>
struct Step<true> {
  static constexpr int kWidth = 2;
  __m512bh w0, w1;
  inline __attribute__((always_inline)) Step(const char* b0, const char* b1, int64_t k) {
    __builtin_memcpy(&w0, b0 + 4 * k * kPanel, sizeof w0);
    __builtin_memcpy(&w1, b1 + 4 * k * kPanel, sizeof w1);
  }
  inline __attribute__((always_inline)) void add(const uint16_t* a, vf& c0, vf& c1) const {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
    c0 = reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c0), x, w0));
    c1 = reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c1), x, w1));
  }
};
#else
// A bfloat16 is the upper half of a float32: the weights are widened as they are loaded.
template <>
struct Step<true> {
  static constexpr int kWidth = 2;
  vf even0, odd0, even1, odd1;
  inline __attribute__((always_inline)) Step(const char* b0, const char* b1, int64_t k) {
    widen(b0 + 4 * k * kPanel, even0, odd0);
    widen(b1 + 4 * k * kPanel, even1, odd1);
  }
  DIWA_INLINE void widen(const char* p, vf& first, vf& second) {
    vi pairs;
    __builtin_memcpy(&pairs, p, sizeof pairs);
    const vi low = pairs << 16, high = pairs & -0x10000;
    __builtin_memcpy(&first, &low, sizeof first);
    __builtin_memcpy(&second, &high, sizeof second);
  }
  inline __attribute__((always_inline)) void add(const float* a, vf& c0, vf& c1) const {
    const vf x = simd::set1(a[0]), y = simd::set1(a[1]);
    c0 += x * even0;
    c1 += x * even1;
    c0 += y * odd0;
    c1 += y * odd1;
  }
};
#endif

// One register tile over `steps` steps: c (kCols apart) = or += the sums. With few rows, several
// partial sums (U) hide the latency of the multiply-add. With more, weights of the next block are
// fetched meanwhile: from `ahead` bytes on, `pace` bytes per step, so that the tiles of a block ask
// for all of it at an even rate.
template <bool BF, int R, int U>
void tile(const typename Act<BF>::type* a, int64_t lda, const char* b0, const char* b1,
          int64_t steps, int64_t ahead, int64_t pace, float* c, bool add) {
  vf sum[U][R][2] = {};
  int64_t k = 0;
  for (; k + U <= steps; k += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const Step<BF> w(b0, b1, k + u);
      if (R <= 2) __builtin_prefetch(b0 + (k + u) * kLine + kStream, 0, 3);
      if (R > 2) __builtin_prefetch(b0 + ahead + (k + u) * pace, 0, 2);
      if (R > 2 && kCols > kPanel) __builtin_prefetch(b1 + ahead + (k + u) * pace, 0, 2);
#pragma GCC unroll 14
      for (int i = 0; i < R; ++i)
        w.add(a + i * lda + (k + u) * Step<BF>::kWidth, sum[u][i][0], sum[u][i][1]);
    }
  }
  if (U > 1) {
    for (; k < steps; ++k) {
      const Step<BF> w(b0, b1, k);
#pragma GCC unroll 14
      for (int i = 0; i < R; ++i)
        w.add(a + i * lda + k * Step<BF>::kWidth, sum[0][i][0], sum[0][i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      vf total = sum[0][i][v];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) total += sum[u][i][v];
      float* p = c + i * kCols + v * DIWA_W;
      simd::store(p, add ? simd::load(p) + total : total);
    }
  }
}

template <bool BF>
struct Tiles {
  typedef void (*Fn)(const typename Act<BF>::type*, int64_t, const char*, const char*, int64_t,
                     int64_t, int64_t, float*, bool);
  // The tile of R rows.
  DIWA_INLINE Fn of(int64_t rows) {
    static constexpr Fn table[] = {
        tile<BF, 1, 4>,  tile<BF, 2, 2>,  tile<BF, 3, 1>,  tile<BF, 4, 1>,
#if DIWA_W >= 8
        tile<BF, 5, 1>,  tile<BF, 6, 1>,
#endif
#if DIWA_W == 16
        tile<BF, 7, 1>,  tile<BF, 8, 1>,  tile<BF, 9, 1>,  tile<BF, 10, 1>,
        tile<BF, 11, 1>, tile<BF, 12, 1>, tile<BF, 13, 1>, tile<BF, 14, 1>,
#endif
    };
    return table[rows - 1];
  }
};

template <bool BF, class Epilogue>
DIWA_INLINE void run(const Weight& w, const typename Act<BF>::type* a, int64_t lda, int64_t M,
                     float* strip, const Epilogue& epilogue) {
  const int64_t tiles = (M + kRows - 1) / kRows;
  for (int64_t n = 0; n < w.N; n += kCols) {
    const char* b[2];
    for (int v = 0; v < 2; ++v) {
      const int64_t column = n + v * DIWA_W;
      b[v] = static_cast<const char*>(w.data) + column / kPanel * w.panel + column % kPanel * 4;
    }
    // A block of the panel stays in the first-level cache for all rows.
    for (int64_t k = 0; k < w.K; k += kBlock) {
      const int64_t left = w.K - k < kBlock ? w.K - k : kBlock;
      const int64_t steps = BF ? even(left) / 2 : left, at = k * kPanel * (BF ? 2 : 4);
      const int64_t next = (kCols + kPanel - 1) / kPanel * w.panel - at;  // of the strip to come
      const int64_t ahead = k + kBlock < w.K ? kBlock * kPanel * (BF ? 2 : 4) : next;
      for (int64_t t = 0, m = 0; t < tiles; ++t) {
        const int64_t rows = M / tiles + (t < M % tiles);
        Tiles<BF>::of(rows)(a + m * lda + k, lda, b[0] + at, b[1] + at, steps,
                            ahead + steps * t / tiles * kLine, kLine / tiles, strip + m * kCols,
                            k > 0);
        m += rows;
      }
    }
    for (int64_t m = 0; m < M; ++m)
      for (int v = 0; v < 2; ++v)
        epilogue(m, n + v * DIWA_W, simd::load(strip + m * kCols + v * DIWA_W));
  }
}

}  // namespace gemm
}  // namespace
}  // namespace diwa
