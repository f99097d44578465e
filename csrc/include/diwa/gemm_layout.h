#pragma once
// What bindings and kernels both must know of gemm.h to share scratch memory.
#include <cstdint>

namespace diwa {
namespace {
namespace gemm {

constexpr int64_t kRound = 32;   // outputs are rounded up to this
constexpr int64_t kBlock = 256;  // values of k summed in registers
constexpr int64_t kStrip = 32;   // floats of strip scratch per row, at most

// Values from one row of activations to the next: whole strips, and not a multiple of 2048 bytes,
// which would put all rows of a tile in the same few cache sets.
static inline __attribute__((always_inline)) int64_t stride(int64_t n) {
  const int64_t whole = (n + kRound - 1) / kRound * kRound;
  return whole % 512 ? whole : whole + kRound;
}

}  // namespace gemm
}  // namespace
}  // namespace diwa
