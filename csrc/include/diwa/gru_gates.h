#pragma once
// The pointwise half of a GRU cell. See diwa/ops/reference.py:gru_gates for the equations.
#include <cstdint>

#include "diwa/isa.h"

namespace diwa {

struct GruGatesArgs {
  const float* gi;  // [B, 3H] input projections, gates r z n
  const float* gh;  // [B, 3H] recurrent projections
  const float* h;   // [B, H] state before
  float* out;       // [B, H] state after
  int64_t H;
};

struct GruGatesBwdArgs {
  const float* grad;  // [B, H] gradient of the state after
  const float* gi;    // [B, 3H]
  const float* gh;    // [B, 3H]
  const float* h;     // [B, H]
  float* d_gi;        // [B, 3H]
  float* d_gh;        // [B, 3H]
  float* d_h;         // [B, H]
  int64_t H;
};

}  // namespace diwa

// Rows row0 <= b < row1.
DIWA_KERNEL(gru_gates_fwd, const GruGatesArgs&, int64_t row0, int64_t row1)
DIWA_KERNEL(gru_gates_bwd, const GruGatesBwdArgs&, int64_t row0, int64_t row1)
