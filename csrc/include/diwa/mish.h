#pragma once
// Mish, elementwise. See diwa/ops/reference.py:mish for the equations.
#include <cstdint>

#include "diwa/isa.h"

namespace diwa {

struct MishArgs {
  const float* x;  // [N]
  float* out;      // [N]
};

struct MishBwdArgs {
  const float* grad;  // [N] gradient of the result
  const float* x;     // [N]
  float* d_x;         // [N]
};

}  // namespace diwa

// Elements i0 <= i < i1.
DIWA_KERNEL(mish_fwd, const MishArgs&, int64_t i0, int64_t i1)
DIWA_KERNEL(mish_bwd, const MishBwdArgs&, int64_t i0, int64_t i1)
