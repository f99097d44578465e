#include "diwa/denoise_chain_cuda.h"

#include <cuda_runtime.h>

#include "diwa/cluster.cuh"
#include "diwa/denoise_chain_tiles.h"

namespace diwa::cuda {
namespace {

using namespace chain_tiles;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// x n / (n + 2) with e = exp x and n = e² + 2 e; beyond 20 it is x.
__device__ __forceinline__ float mish(float x) {
  const float e = __expf(x > 20.f ? 20.f : x), n = e * (e + 2.f);
  return x * __fdividef(n, n + 2.f);
}

// NaN stays NaN, which fminf and fmaxf would replace by the bound.
__device__ __forceinline__ float clamp(float x, float low, float high) {
  x = x > high ? high : x;
  return x < low ? low : x;
}

template <int W, int M>
struct Block {
  using L = Layout<W, M>;
  using Tile = float[L::kRowTiles][2][4];  // of a warp: M rows by 16 features

  unsigned char* memory;
  uint32_t base;  // its shared address
  int warp, lane, rank;

  __device__ __nv_bfloat16* half(int offset) const {
    return reinterpret_cast<__nv_bfloat16*>(memory + offset);
  }

  // This block's features of a network.
  __device__ void load_network(const ChainNetwork& net, int P) const {
    const auto* w1 = static_cast<const __nv_bfloat16*>(net.hidden1) + int64_t(rank) * kSlice * W;
    const auto* w2 = static_cast<const __nv_bfloat16*>(net.hidden2) + int64_t(rank) * kSlice * W;
    for (int i = threadIdx.x; i < kSlice * (W / 8); i += kThreads) {
      const int to = i / (W / 8) * L::kLd + i % (W / 8) * 8;
      copy_async(base + L::kHidden1 + to * 2, w1 + i * 8);
      copy_async(base + L::kHidden2 + to * 2, w2 + i * 8);
    }
    const auto* out = static_cast<const __nv_bfloat16*>(net.out) + rank * kSlice;
    for (int i = threadIdx.x; i < P * (kSlice / 8); i += kThreads) {
      const int row = i / (kSlice / 8), col = i % (kSlice / 8) * 8;
      copy_async(base + L::kOut + (row * kLdOut + col) * 2, out + row * W + col);
    }
    const auto* in = static_cast<const __nv_bfloat16*>(net.chunk_in) + rank * kSlice * P;
    for (int i = threadIdx.x; i < kSlice * P; i += kThreads)
      half(L::kIn)[i / P * kLdX + i % P] = in[i];
    copy_async_wait();
    __syncthreads();
  }

  // c += act w for a warp's 16 features; act [M, ld] and w [64, ld] at byte offsets. Even and odd
  // steps have sums of their own, for twice as many independent instructions.
  template <int kInputs, int kLd>
  __device__ void multiply(Tile& c, int act, int w) const {
    const uint32_t a0 = base + act + (a_row(lane) * kLd + a_col(lane)) * 2;
    const uint32_t b0 = base + w + ((warp * kWarpFeatures + b_row(lane)) * kLd + b_col(lane)) * 2;
    Tile odd = {};
#pragma unroll 4
    for (int k = 0; k < kInputs; k += 32) {
#pragma unroll
      for (int half_step = 0; half_step < 2; ++half_step) {
        uint32_t b[4];
        load_matrices(b, b0 + (k + 16 * half_step) * 2);
#pragma unroll
        for (int i = 0; i < L::kRowTiles; ++i) {
          uint32_t a[4];
          load_matrices(a, a0 + (16 * i * kLd + k + 16 * half_step) * 2);
          mma(half_step ? odd[i][0] : c[i][0], a, b[0], b[1]);
          mma(half_step ? odd[i][1] : c[i][1], a, b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < L::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][j][e] += odd[i][j][e];
  }

  // mish(c), rounded, to this warp's columns of the activations in every block of the cluster. The
  // warp gathers rows of 16 bytes in its own block first, then copies those.
  __device__ void publish(const Tile& c, int act) const {
    const int col0 = rank * kSlice + warp * kWarpFeatures;
    __nv_bfloat16* to = half(act);
#pragma unroll
    for (int i = 0; i < L::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int at = (16 * i + c_row(lane, e)) * L::kLd + col0 + 8 * j + c_col(lane, e);
          *reinterpret_cast<uint32_t*>(to + at) = pack(mish(c[i][j][e]), mish(c[i][j][e + 1]));
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < L::kRowTiles; ++i) {
      const int at = (16 * i + copy_row(lane)) * L::kLd + col0 + copy_col(lane);
      const uint4 v = *reinterpret_cast<const uint4*>(to + at);
#pragma unroll
      for (int peer = 1; peer < L::kCluster; ++peer)
        store_cluster(in_block(base + act + at * 2, (rank + peer) % L::kCluster), v);
    }
  }

  // The partial output of a warp's 16 features. The accumulators of two tiles of 8 features are, in
  // place, the first operand of a product over 16 inputs.
  __device__ void output(const Tile& y) const {
    const uint32_t b0 =
        base + L::kOut + (b_row(lane) * kLdOut + warp * kWarpFeatures + b_col(lane)) * 2;
    float* partial = reinterpret_cast<float*>(memory + L::kPartial) + warp * M * kChunk;
    uint32_t b[2][4];
    load_matrices(b[0], b0);
    load_matrices(b[1], b0 + 16 * kLdOut * 2);
#pragma unroll
    for (int i = 0; i < L::kRowTiles; ++i) {
      const uint32_t a[4] = {pack(y[i][0][0], y[i][0][1]), pack(y[i][0][2], y[i][0][3]),
                             pack(y[i][1][0], y[i][1][1]), pack(y[i][1][2], y[i][1][3])};
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        float c[4] = {};
        mma(c, a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int at = sum_index(16 * i + c_row(lane, e), 8 * j + c_col(lane, e));
          *reinterpret_cast<float2*>(partial + at) = make_float2(c[e], c[e + 1]);
        }
      }
    }
  }
};

// Four neighbouring numbers of one row's chunk, the same in every block of the cluster.
struct Item {
  int row, col;
  bool used;  // inside the batch
  float x[4], noise[4];

  __device__ __forceinline__ void load_noise(const float* p) {
    if (!used) return;
    const float4 v = *reinterpret_cast<const float4*>(p);
    noise[0] = v.x, noise[1] = v.y, noise[2] = v.z, noise[3] = v.w;
  }
  static __device__ __forceinline__ void store(float* p, const float (&v)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
  }
};

// x0 = clamp(p x - q eps), x' = c1 x0 + c2 x + std n, log p = -(ratio n)² / 2 - constant
__device__ __forceinline__ void advance(Item& item, const float (&eps)[4], const float* table,
                                        float clip, float (&log_prob)[4]) {
  const float p = __ldg(table), q = __ldg(table + 1), c1 = __ldg(table + 2), c2 = __ldg(table + 3);
  const float std = __ldg(table + 4), ratio = __ldg(table + 5), constant = __ldg(table + 6);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float n = clamp(item.noise[i], -clip, clip);
    const float x0 = clamp(p * item.x[i] - q * eps[i], -1.f, 1.f);
    item.x[i] = c1 * x0 + c2 * item.x[i] + std * n;
    log_prob[i] = -0.5f * (ratio * n) * (ratio * n) - constant;
  }
}

#endif

// One cluster per M rows. Three cluster barriers a step: after the activations of each hidden layer
// have been written into all blocks, and after the blocks' shares of the output.
template <int W, int M>
__global__ void __launch_bounds__(kThreads, 1) denoise_chain_kernel(const ChainArgs args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using L = Layout<W, M>;
  extern __shared__ __align__(16) unsigned char memory[];
  const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Block<W, M> block{memory, shared_address(memory), warp, lane, rank};
  const int64_t row0 = int64_t(blockIdx.x / L::kCluster) * M, N = args.N;
  const int P = args.P, quads = P / 4, feature = rank * kSlice + warp * kWarpFeatures;
  float* sum = reinterpret_cast<float*>(memory + L::kSum);

  // Columns beyond P of x, and inputs and outputs beyond P of the weights, stay zero.
  for (int i = threadIdx.x; i < (L::kSum - L::kX) / 4; i += kThreads)
    reinterpret_cast<uint32_t*>(memory + L::kX)[i] = 0;
  __syncthreads();
  Item item[L::kItems];
#pragma unroll
  for (int j = 0; j < L::kItems; ++j) {
    const int at = threadIdx.x + j * kThreads;
    Item& m = item[j];
    m.row = at / quads, m.col = at % quads * 4;
    m.used = at < M * quads && row0 + m.row < N;
#pragma unroll
    for (int i = 0; i < 4; ++i) m.noise[i] = 0.f;
    m.load_noise(args.noise + (row0 + m.row) * P + m.col);
#pragma unroll
    for (int i = 0; i < 4; ++i) m.x[i] = m.noise[i];
    if (m.used)
      *reinterpret_cast<uint2*>(block.half(L::kX) + m.row * kLdX + m.col) =
          make_uint2(pack(m.x[0], m.x[1]), pack(m.x[2], m.x[3]));
  }
  cluster_barrier();  // no block may write into one that has not started

  typename Block<W, M>::Tile cond, y, h;
  for (int s = 0; s < args.K; ++s) {
    const int t = args.K - 1 - s;
    const ChainNetwork& net = args.net[s >= args.base_steps];
    if (s == 0 || s == args.base_steps) {
      block.load_network(net, P);
#pragma unroll
      for (int i = 0; i < L::kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int64_t row = row0 + 16 * i + c_row(lane, e);
            const int64_t at = row * W + feature + 8 * j + c_col(lane, e);
            cond[i][j][e] = row < N ? __ldg(net.cond + at) : 0.f;
          }
    }
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      const Item& m = item[j];
      if (m.used && t == args.ft_steps - 1 && writer(m.row, L::kCluster) == rank)
        Item::store(args.chain + (row0 + m.row) * (args.ft_steps + 1) * P + m.col, m.x);
      item[j].load_noise(args.noise + ((s + 1) * N + row0 + m.row) * P + m.col);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = feature + 8 * j + c_col(lane, e);
        const float time = __ldg(net.time + int64_t(t) * W + f), bias = __ldg(net.bias1 + f);
#pragma unroll
        for (int i = 0; i < L::kRowTiles; ++i) y[i][j][e] = cond[i][j][e] + time, h[i][j][e] = bias;
      }
    block.template multiply<kChunk, kLdX>(y, L::kX, L::kIn);
    block.publish(y, L::kAct1);
    cluster_barrier();
    block.template multiply<W, L::kLd>(h, L::kAct1, L::kHidden1);
    block.publish(h, L::kAct2);
    cluster_barrier();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float bias = __ldg(net.bias2 + feature + 8 * j + c_col(lane, e));
#pragma unroll
        for (int i = 0; i < L::kRowTiles; ++i) y[i][j][e] += bias;
      }
    block.template multiply<W, L::kLd>(y, L::kAct2, L::kHidden2);
    block.output(y);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      if (!item[j].used) continue;
      const int at = sum_index(item[j].row, item[j].col);
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 v = *reinterpret_cast<const float4*>(
            reinterpret_cast<const float*>(memory + L::kPartial) + w * M * kChunk + at);
        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
      }
      *reinterpret_cast<float4*>(sum + at) = total;
    }
    cluster_barrier();
#pragma unroll
    for (int j = 0; j < L::kItems; ++j) {
      Item& m = item[j];
      if (!m.used) continue;
      const uint32_t at = block.base + L::kSum + sum_index(m.row, m.col) * 4;
      float eps[4], log_prob[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) eps[i] = __ldg(net.out_bias + m.col + i);
#pragma unroll
      for (int r = 0; r < L::kCluster; ++r) {
        const float4 v = load_cluster(in_block(at, r));
        eps[0] += v.x, eps[1] += v.y, eps[2] += v.z, eps[3] += v.w;
      }
      advance(m, eps, args.table + t * kTable, args.clip_noise, log_prob);
      *reinterpret_cast<uint2*>(block.half(L::kX) + m.row * kLdX + m.col) =
          make_uint2(pack(m.x[0], m.x[1]), pack(m.x[2], m.x[3]));
      if (writer(m.row, L::kCluster) != rank) continue;
      const int64_t row = row0 + m.row;
      if (t < args.ft_steps) {
        const int64_t j_ft = args.ft_steps - 1 - t;
        Item::store(args.chain + (row * (args.ft_steps + 1) + j_ft + 1) * P + m.col, m.x);
        Item::store(args.log_prob + (row * args.ft_steps + j_ft) * P + m.col, log_prob);
      }
      if (t == 0) Item::store(args.chunk + row * P + m.col, m.x);
    }
    __syncthreads();
  }
  cluster_barrier();  // no block may end while another reads its sums
#endif
}

template <int W, int M>
cudaError_t launch(const ChainArgs& args, cudaStream_t stream) {
  using L = Layout<W, M>;
  const auto kernel = denoise_chain_kernel<W, M>;
  if (cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes))
    return e;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = L::kCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned((args.N + M - 1) / M) * L::kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = L::kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Small tiles while they fill the device (16 clusters of 8 blocks on an H100), then larger ones.
template <int W>
cudaError_t launch(const ChainArgs& args, cudaStream_t stream) {
  return args.N <= 16 * 16 ? launch<W, 16>(args, stream) : launch<W, 32>(args, stream);
}

}  // namespace

const char* denoise_chain_problem(const ChainArgs& args) {
  if (args.W != 256 && args.W != 512) return "width must be 256 or 512";
  if (args.P < 4 || args.P > kChunk || args.P % 4) return "L * A must be 4, 8, ... 32";
  int device = 0, major = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return "no CUDA device";
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (major < 9) return "thread-block clusters need compute capability 9.0";
  const int wanted = args.W == 512 ? Layout<512, 32>::kBytes : Layout<256, 32>::kBytes;
  return shared < wanted ? "too little shared memory per block" : nullptr;
}

cudaError_t denoise_chain(const ChainArgs& args, cudaStream_t stream) {
  if (args.N == 0 || args.K == 0) return cudaSuccess;
  return args.W == 512 ? launch<512>(args, stream) : launch<256>(args, stream);
}

}  // namespace diwa::cuda
