#pragma once
// Helpers of the binding files, the only ones that know torch (through its stable ABI).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace diwa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor contig(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline const float* f32(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* f32_out(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// body(row0, row1) over [0, rows), split over torch's threads when there are enough elements.
template <class Body>
void for_rows(int64_t rows, int64_t elements_per_row, const Body& body) {
  const int64_t grain = 1 + 16384 / std::max<int64_t>(elements_per_row, 1);
  if (rows <= grain) {
    if (rows > 0) body(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, [&](int64_t r0, int64_t r1) { body(r0, r1); });
  }
}

}  // namespace diwa
