#pragma once
// The whole denoising chain. See diwa/ops/reference_chain.py:denoise_chain for the equations.
#include <cstdint>

#include "diwa/gemm_layout.h"
#include "diwa/isa.h"

namespace diwa {

// One denoising network; packed weights as in gemm.h, in bfloat16 if `bf16`, else float32.
struct ChainNet {
  bool bf16;
  const void* chunk_in;             // packed [W, P]
  const void* cond_in;              // packed [W, D]
  const void* table;                // [S * C, Wr] rows for class indices, Wr: W up to 32s; or null
  const float* bias;                // [K, W] of the first layer at every step
  const void* const* hidden;        // layers x packed [W, W]
  const float* const* hidden_bias;  // layers x [W]
  const void* out;                  // packed [P, W]
  const float* out_bias;            // [P]
};

// A row of coefficients per step t: x0 = clamp(p x - q eps), mean = c1 x0 + c2 x, x' = mean + std
// n, log p = -(scale n)² / 2 - offset.
struct ChainStep {
  float p, q, c1, c2, std, scale, offset;
};

struct DenoiseChainArgs {
  const float* noise;      // [K + 1, N, P]
  const float* cond;       // [N, D] features, or their dense part if there are class indices
  const int64_t* z_idx;    // [N, S], or null
  const ChainStep* steps;  // [K]
  ChainNet base, tuned;
  float* chunk;     // [N, P]
  float* chain;     // [N, Kf + 1, P]
  float* log_prob;  // [N, Kf, P]
  int64_t N, P, W, D, S, C, K, Kf;
  int64_t base_steps;  // steps, from t = K - 1 down, that the base network takes
  int64_t layers;      // hidden layers; an even number in a residual network
  bool residual;
  float clip_noise;
};

// Floats of scratch for a call with `rows` rows.
static inline int64_t denoise_chain_scratch(const DenoiseChainArgs& a, int64_t rows) {
  return rows * (2 * gemm::stride(a.P) + 4 * gemm::stride(a.W) + gemm::stride(gemm::kBlock) +
                 gemm::kStrip);
}

}  // namespace diwa

// Rows row0 <= n < row1.
DIWA_KERNEL(denoise_chain, const DenoiseChainArgs&, int64_t row0, int64_t row1, float* scratch)
