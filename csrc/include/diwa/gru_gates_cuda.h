#pragma once
// The pointwise half of a GRU cell on the GPU. All tensors contiguous, of one dtype.
#include "diwa/cuda.h"

namespace diwa::cuda {

cudaError_t gru_gates_fwd(DType dtype,
                          const void* gi,  // [B, 3H]
                          const void* gh,  // [B, 3H]
                          const void* h,   // [B, H]
                          void* out,       // [B, H]
                          int64_t B, int64_t H, cudaStream_t stream);

cudaError_t gru_gates_bwd(DType dtype,
                          const void* grad,  // [B, H]
                          const void* gi,    // [B, 3H]
                          const void* gh,    // [B, 3H]
                          const void* h,     // [B, H]
                          void* d_gi,        // [B, 3H]
                          void* d_gh,        // [B, 3H]
                          void* d_h,         // [B, H]
                          int64_t B, int64_t H, cudaStream_t stream);

}  // namespace diwa::cuda
