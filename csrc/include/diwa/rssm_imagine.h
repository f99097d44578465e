#pragma once
// Prior steps of an RSSM. See diwa/ops/reference_rssm.py:rssm_imagine for the equations.
#include <cstdint>

#include "diwa/isa.h"

namespace diwa {

struct RSSMImagineArgs {
  int64_t L, N, H, U, S, C, A;
  float sharpness;  // 1 / temperature
  float unimix, eps;
  const float* h0;        // [N, H]
  const int64_t* z0;      // [N, S] in [-1, C)
  const float* actions;   // [L, N, A]
  const float* uniforms;  // [L, N, S]
  const float* table;     // [Z, U], cell_z transposed
  const float* cell_a;    // [A, U], transposed
  const float *cell_bias, *cell_gain, *cell_shift, *b_ih, *b_hh, *head_bias, *head_gain,
      *head_shift, *out_bias;
  const void *w_ih, *w_hh, *head, *out;  // packed (gemm.h)
  float* h;                              // [L, N, H]
  int64_t* z;                            // [L, N, S]
  float* features;                       // [L, N, H + Z] or null
};

// Floats of scratch for R rows.
inline int64_t rssm_imagine_scratch(int64_t R, int64_t H, int64_t U, int64_t S, int64_t C) {
  const int64_t rows = 2 * (U + 64) + (H + 64) + 2 * (3 * H + 64) + (S * C + 64) + S + 32;
  return R * rows + U + C + 256;
}

}  // namespace diwa

// Dreams row0 <= n < row1, all steps.
DIWA_KERNEL(rssm_imagine_f32, const RSSMImagineArgs&, int64_t row0, int64_t row1, float* scratch)
DIWA_KERNEL(rssm_imagine_bf16, const RSSMImagineArgs&, int64_t row0, int64_t row1, float* scratch)
