#pragma once
// Helpers of the CUDA binding files.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "diwa/binding.h"
#include "diwa/cuda.h"

namespace diwa {

// libtorch_cuda.so does not exist beside a CPU torch, so the function is looked up, not linked.
inline cudaStream_t current_stream(const Tensor& t) {
  using Fn = AOTITorchError (*)(int32_t, void**);
  static const Fn fn = [] {
    void* lib = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return lib ? reinterpret_cast<Fn>(dlsym(lib, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(fn, "diwa: this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(!fn(t.get_device_index(), &stream), "diwa: torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline cuda::DType storage_type(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return cuda::DType::f32;
    case ScalarType::Half:
      return cuda::DType::f16;
    case ScalarType::BFloat16:
      return cuda::DType::bf16;
    default:
      STD_TORCH_CHECK(false, op, ": float32, float16 or bfloat16 only");
  }
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "diwa::", op, ": ", cudaGetErrorString(error));
}

}  // namespace diwa
