#pragma once
// What every CUDA kernel file and its binding share. No torch header.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace diwa::cuda {
enum class DType { f32, f16, bf16 };  // storage; arithmetic is float32
}
