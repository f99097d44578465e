#include "diwa/denoise_chain.h"

#include "diwa/activation.h"
#include "diwa/gemm.h"

namespace diwa {
namespace DIWA_ISA {

using namespace simd;

namespace {

// The rows of one call and where their activations live.
struct Tile {
  int64_t row0, rows;
  float* x;     // [rows, stride(P)] noisy chunks; zero from P on
  float* cond;  // [rows, stride(W)] projected condition
  float* y;     // [rows, stride(W)] residual stream
  float* strip;
  float *chunk_act, *cond_act, *act[2];  // inputs of the GEMMs: Act<BF>::type
};

Tile make_tile(const DenoiseChainArgs& a, int64_t row0, int64_t row1, float* scratch) {
  Tile t;
  t.row0 = row0, t.rows = row1 - row0;
  const int64_t chunk = t.rows * gemm::stride(a.P), wide = t.rows * gemm::stride(a.W);
  t.x = scratch, t.chunk_act = t.x + chunk;
  t.cond = t.chunk_act + chunk, t.y = t.cond + wide;
  t.act[0] = t.y + wide, t.act[1] = t.act[0] + wide;
  t.cond_act = t.act[1] + wide;
  t.strip = t.cond_act + t.rows * gemm::stride(gemm::kBlock);
  return t;
}

DIWA_INLINE vf load_row(const float* p) { return load(p); }

DIWA_INLINE vf load_row(const uint16_t* p) {
  typedef uint16_t vh __attribute__((vector_size(DIWA_W * 2)));
  vh half;
  __builtin_memcpy(&half, p, sizeof half);
  const vi bits = __builtin_convertvector(half, vi) << 16;
  vf v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

// cond = sum of the table rows of the class indices; zero without a table.
template <class Value>
void gather(const DenoiseChainArgs& a, const Value* table, const Tile& t) {
  const int64_t ld = gemm::stride(a.W), width = gemm::round_up(a.W);
  for (int64_t m = 0; m < t.rows; ++m) {
    const int64_t* index = table ? a.z_idx + (t.row0 + m) * a.S : nullptr;
    for (int64_t n = 0; n < width; n += 2 * DIWA_W) {
      vf low = {}, high = {};
      for (int64_t s = 0; table && s < a.S; ++s) {
        const Value* row = table + (s * a.C + index[s]) * width + n;
        low += load_row(row);
        high += load_row(row + DIWA_W);
      }
      store(t.cond + m * ld + n, low);
      store(t.cond + m * ld + n + DIWA_W, high);
    }
  }
}

template <bool BF>
DIWA_INLINE void to_act(float* act, int64_t ld_act, const float* x, int64_t ld, int64_t rows,
                        int64_t n) {
  auto* out = reinterpret_cast<typename gemm::Act<BF>::type*>(act);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t i = 0; i < n; i += DIWA_W)
      gemm::Act<BF>::store(out + m * ld_act + i, load(x + m * ld + i, n - i));
}

// GEMM from and to the activation buffers, all of which hold float-sized places.
template <bool BF, class Epilogue>
DIWA_INLINE void linear(const gemm::Weight& w, const float* act, int64_t ld, const Tile& t,
                        const Epilogue& epilogue) {
  gemm::run<BF>(w, reinterpret_cast<const typename gemm::Act<BF>::type*>(act), ld, t.rows, t.strip,
                epilogue);
}

template <bool BF>
void project_condition(const DenoiseChainArgs& a, const ChainNet& net, const Tile& t) {
  if (BF)
    gather(a, static_cast<const uint16_t*>(net.table), t);
  else
    gather(a, static_cast<const float*>(net.table), t);
  const gemm::Weight all = gemm::weight<BF>(net.cond_in, a.W, a.D);
  const int64_t ld = gemm::stride(gemm::kBlock), ld_w = gemm::stride(a.W);
  for (int64_t k = 0; k < a.D; k += gemm::kBlock) {
    const int64_t end = a.D < k + gemm::kBlock ? a.D : k + gemm::kBlock;
    to_act<BF>(t.cond_act, ld, a.cond + t.row0 * a.D + k, a.D, t.rows, end - k);
    linear<BF>(gemm::part<BF>(all, k, end), t.cond_act, ld, t, [&](int64_t m, int64_t n, vf sum) {
      float* c = t.cond + m * ld_w + n;
      store(c, load(c) + sum);
    });
  }
}

// Predicted noise; `finish` is the epilogue of the last layer.
template <bool BF, class Finish>
DIWA_INLINE void network(const DenoiseChainArgs& a, const ChainNet& net, const Tile& t,
                         int64_t step, const Finish& finish) {
  using Act = gemm::Act<BF>;
  typedef typename Act::type* Ptr;
  const int64_t W = a.W, ld = gemm::stride(W), ld_p = gemm::stride(a.P);
  const float* bias = net.bias + step * W;
  Ptr in = reinterpret_cast<Ptr>(t.act[0]), out = reinterpret_cast<Ptr>(t.act[1]);
  const bool residual = a.residual, only = a.layers == 0;
  to_act<BF>(t.chunk_act, ld_p, t.x, ld_p, t.rows, a.P);
  linear<BF>(gemm::weight<BF>(net.chunk_in, W, a.P), t.chunk_act, ld_p, t,
             [&](int64_t m, int64_t n, vf sum) {
               const vf y = sum + load(bias + n, W - n) + load(t.cond + m * ld + n);
               if (residual) store(t.y + m * ld + n, y);
               Act::store(in + m * ld + n, residual && only ? y : vmish(y));
             });
  for (int64_t i = 0; i < a.layers; ++i) {
    const gemm::Weight w = gemm::weight<BF>(net.hidden[i], W, W);
    const float* b = net.hidden_bias[i];
    const bool last = i + 1 == a.layers;
    if (residual && i % 2) {
      gemm::run<BF>(w, in, ld, t.rows, t.strip, [&](int64_t m, int64_t n, vf sum) {
        float* stream = t.y + m * ld + n;
        const vf y = load(stream) + (sum + load(b + n, W - n));
        if (!last) store(stream, y);
        Act::store(out + m * ld + n, last ? y : vmish(y));
      });
    } else {
      gemm::run<BF>(w, in, ld, t.rows, t.strip, [&](int64_t m, int64_t n, vf sum) {
        Act::store(out + m * ld + n, vmish(sum + load(b + n, W - n)));
      });
    }
    const Ptr swap = in;
    in = out, out = swap;
  }
  gemm::run<BF>(gemm::weight<BF>(net.out, a.P, W), in, ld, t.rows, t.strip, finish);
}

DIWA_INLINE vf clamp(vf x, float bound) { return vmin(set1(bound), vmax(set1(-bound), x)); }

// Steps t_begin > t >= t_end by one network.
template <bool BF>
void denoise(const DenoiseChainArgs& a, const ChainNet& net, const Tile& tile, int64_t t_begin,
             int64_t t_end) {
  if (t_begin == t_end) return;
  project_condition<BF>(a, net, tile);
  const int64_t P = a.P, ld = gemm::stride(P);
  for (int64_t t = t_begin - 1; t >= t_end; --t) {
    const ChainStep s = a.steps[t];
    const float* noise = a.noise + ((a.K - t) * a.N + tile.row0) * P;
    const int64_t j = a.Kf ? a.Kf - t : -1;  // place of this step's result in the chain
    network<BF>(a, net, tile, t, [&](int64_t m, int64_t n, vf sum) {
      const int64_t left = P - n;
      if (left <= 0) return;
      float* px = tile.x + m * ld + n;
      const vf x = load(px), eps = sum + load(net.out_bias + n, left);
      const vf xi = clamp(load(noise + m * P + n, left), a.clip_noise);
      const vf next = s.c1 * clamp(s.p * x - s.q * eps, 1.f) + s.c2 * x + s.std * xi;
      store(px, next);
      const int64_t row = tile.row0 + m;
      if (t == 0) store(a.chunk + row * P + n, next, left);
      if (j < 1) {
        if (j == 0) store(a.chain + row * (a.Kf + 1) * P + n, next, left);
        return;
      }
      const vf scaled = s.scale * xi;
      store(a.chain + (row * (a.Kf + 1) + j) * P + n, next, left);
      store(a.log_prob + (row * a.Kf + j - 1) * P + n, -0.5f * scaled * scaled - s.offset, left);
    });
  }
}

}  // namespace

void denoise_chain(const DenoiseChainArgs& a, int64_t row0, int64_t row1, float* scratch) {
  const Tile tile = make_tile(a, row0, row1, scratch);
  const int64_t ld = gemm::stride(a.P);
  for (int64_t m = 0; m < tile.rows; ++m) {
    for (int64_t n = 0; n < ld; n += DIWA_W) {
      const int64_t left = a.P - n, row = row0 + m;
      const vf x = left > 0 ? load(a.noise + row * a.P + n, left) : (vf){};
      store(tile.x + m * ld + n, x);
      if (left > 0 && a.Kf > 0 && a.Kf == a.K) store(a.chain + row * (a.Kf + 1) * a.P + n, x, left);
    }
  }
  const int64_t change = a.K - a.base_steps;
  (a.base.bf16 ? denoise<true> : denoise<false>)(a, a.base, tile, a.K, change);
  (a.tuned.bf16 ? denoise<true> : denoise<false>)(a, a.tuned, tile, change, 0);
}

}  // namespace DIWA_ISA
}  // namespace diwa
