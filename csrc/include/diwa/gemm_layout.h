#pragma once
// What bindings and kernels both must know of gemm.h to share scratch memory.
#include <cstdint>

namespace diwa {
namespace {
namespace gemm {

constexpr int64_t kRound = 32;   // outputs are rounded up to this
constexpr int64_t kBlock = 256;  // values of k summed in registers
constexpr int64_t kStrip = 32;   // floats of strip scratch per row, at most

static inline __attribute__((always_inline)) int64_t round_up(int64_t n) {
  return (n + kRound - 1) / kRound * kRound;
}

// Values of a packed weight [n, k].
static inline int64_t packed_values(int64_t n, int64_t k, bool bf16) {
  return round_up(n) * (bf16 ? k + (k & 1) : k);
}

// Values from one row of activations to the next: whole strips, and not a multiple of 2048 bytes,
// which would put all rows of a tile in the same few cache sets.
static inline __attribute__((always_inline)) int64_t stride(int64_t n) {
  const int64_t whole = round_up(n);
  return whole % 512 ? whole : whole + kRound;
}

}  // namespace gemm
}  // namespace
}  // namespace diwa
