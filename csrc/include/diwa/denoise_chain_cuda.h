#pragma once
// The denoising chain in one launch of thread-block clusters (compute capability 9 and newer).
#include "diwa/cuda.h"

namespace diwa::cuda {

// Weights of one pre-activation residual network; hidden, input and output weights bfloat16.
struct ChainNetwork {
  const void* chunk_in;   // [W, P]
  const float* time;      // [K, W], first-layer contribution of each step
  const void* hidden1;    // [W, W]
  const float* bias1;     // [W]
  const void* hidden2;    // [W, W]
  const float* bias2;     // [W]
  const void* out;        // [P, W]
  const float* out_bias;  // [P]
  const float* cond;      // [N, W], projected condition with its bias
};

struct ChainArgs {
  ChainNetwork net[2];  // frozen, then fine-tuned
  const float* noise;   // [K + 1, N, P]
  const float* table;   // [K, 7], see denoise_chain_tiles.h; row t
  float* chunk;         // [N, P]
  float* chain;         // [N, Kf + 1, P]
  float* log_prob;      // [N, Kf, P]
  int64_t N;
  int P, W, K;
  int base_steps;  // steps of net[0]; the rest run net[1]
  int ft_steps;    // Kf
  float clip_noise;
};

// Why the current device or these sizes cannot run it; null if they can.
const char* denoise_chain_problem(const ChainArgs& args);

cudaError_t denoise_chain(const ChainArgs& args, cudaStream_t stream);

}  // namespace diwa::cuda
