#pragma once
// Posterior scan of an RSSM. See diwa/ops/reference_rssm.py:rssm_observe for the equations.
#include <cstdint>

#include "diwa/isa.h"

namespace diwa {

struct RSSMObserveArgs {
  int64_t T, B, H, U, S, C;
  float unimix, eps;
  const float* embed;    // [T, B, U] projections, biases included
  const float* action;   // [T, B, U]
  const float* first;    // [B, U] projection of the masked z before the first frame
  const float* keep;     // [T, B], 1 - reset
  const float* h0;       // [B, H]
  const float* uniform;  // [T, B, S]
  const float* table;    // [Z, U], cell_z transposed
  const float *cell_gain, *cell_shift, *b_ih, *b_hh, *head_gain, *head_shift, *out_bias;
  const void *w_ih, *w_hh, *head, *out;  // packed (gemm.h)
  float *h, *z, *logits;                 // [T, B, H], [T, B, Z], [T, B, Z]
  // For the backward pass: layer inputs x, y and outputs a, b; gates r, z, n and h's part of n.
  // [T, B, ...], or [1, B, ...], written again by every frame, when there will be none.
  float *x, *a, *gates, *y, *b;  // U, U, 4H, U, U wide
  int64_t saved;                 // T or 1
};

struct RSSMObserveBwdArgs {
  int64_t T, B, H, U, S, C;
  float unimix, eps;
  const float *g_h, *g_z, *g_logits;                            // gradients of the results
  const float *keep, *h0, *h, *logits, *x, *a, *gates, *y, *b;  // as above
  const float *cell_gain, *cell_shift, *head_gain, *head_shift;
  const void* out_t;    // packed transposes: [U, Z]
  const void* head_t;   // [H, U]
  const void* w_ih_t;   // [U, 3H], inputs in the order n, r, z
  const void* w_hh_t;   // [H, 3H]
  const void* cell_zt;  // [Z, U]
  float *d_x, *d_y;     // [T, B, U]
  float* d_gates;       // [T, B, 4H]: n, r, z, and n times r
  float* d_logits;      // [T, B, Z]
  float *d_h0, *d_z0;   // [B, H], [B, Z]
  float* d_norms;       // [B, 4U], zero before: gain and shift of the cell's norm, of the head's
};

inline int64_t rssm_widest(int64_t H, int64_t U, int64_t Z) {
  const int64_t a = 4 * H > Z ? 4 * H : Z;
  return a > U ? a : U;
}

// Floats of scratch for R rows of either pass.
inline int64_t rssm_observe_scratch(int64_t R, int64_t H, int64_t U, int64_t Z) {
  const int64_t rows = 2 * (rssm_widest(H, U, Z) + 64) + 2 * (3 * H + 64) + Z + 64 + 32;
  return R * rows + U + Z + 256;
}

}  // namespace diwa

// Rows row0 <= b < row1, all frames.
DIWA_KERNEL(rssm_observe_fwd_f32, const RSSMObserveArgs&, int64_t row0, int64_t row1, float*)
DIWA_KERNEL(rssm_observe_fwd_bf16, const RSSMObserveArgs&, int64_t row0, int64_t row1, float*)
DIWA_KERNEL(rssm_observe_bwd_f32, const RSSMObserveBwdArgs&, int64_t row0, int64_t row1, float*)
DIWA_KERNEL(rssm_observe_bwd_bf16, const RSSMObserveBwdArgs&, int64_t row0, int64_t row1, float*)
