#pragma once
// What the bindings of the RSSM operators share. DIWA_CHECK expects a constant `kName`.
#include <vector>

#include "diwa/binding_tiles.h"
#include "diwa/gemm_layout.h"

namespace diwa {

using Tensors = std::vector<Tensor>;

#define DIWA_CHECK(name, ...)                                                                \
  STD_TORCH_CHECK(name.scalar_type() == ScalarType::Float && has_shape(name, {__VA_ARGS__}), \
                  kName, ": " #name " must be float32 [" #__VA_ARGS__ "]")

// A weight of `outputs` rows and `inputs` columns in the layout of gemm.h.
inline void check_packed(const char* op, const char* name, const Tensor& packed, int64_t outputs,
                         int64_t inputs, bool bf16) {
  const int64_t size = gemm::packed_values(outputs, inputs, bf16);
  STD_TORCH_CHECK(packed.scalar_type() == (bf16 ? ScalarType::BFloat16 : ScalarType::Float) &&
                      packed.dim() == 1 && packed.size(0) == size && packed.is_contiguous(),
                  op, ": packed ", name, " has the wrong size or dtype");
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && has_shape(t, {size}), op, ": ", name,
                  " must be float32 with ", size, " values");
}

inline Tensors contiguous(const Tensors& tensors) {
  Tensors out;
  for (const Tensor& t : tensors) out.push_back(contig(t));
  return out;
}

}  // namespace diwa
