#include "diwa/gru_gates_cuda.h"

#include <initializer_list>

#include "diwa/vec.cuh"

namespace diwa::cuda {
namespace {

constexpr int kThreads = 256;

// One thread computes V neighbouring columns of one row; grid (B, H / (V kThreads)).
// r = σ(gi_r + gh_r),  z = σ(gi_z + gh_z),  n = tanh(gi_n + r gh_n),  h' = n + z (h - n)
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gru_gates_fwd_kernel(const T* __restrict__ gi,  // [B, 3H]
                         const T* __restrict__ gh,  // [B, 3H]
                         const T* __restrict__ h,   // [B, H]
                         T* __restrict__ out,       // [B, H]
                         int64_t H) {
  const int64_t b = blockIdx.x, c = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * V;
  if (c >= H) return;
  const T *pi = gi + b * 3 * H + c, *ph = gh + b * 3 * H + c;
  float ir[V], iz[V], in[V], hr[V], hz[V], hn[V], h0[V], y[V];
  load(ir, pi), load(iz, pi + H), load(in, pi + 2 * H);
  load(hr, ph), load(hz, ph + H), load(hn, ph + 2 * H);
  load(h0, h + b * H + c);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float r = sigmoid(ir[i] + hr[i]), z = sigmoid(iz[i] + hz[i]);
    const float n = tanhf(in[i] + r * hn[i]);
    y[i] = n + z * (h0[i] - n);
  }
  store(out + b * H + c, y);
}

// The gates are computed again from gi and gh: cheaper than writing and reading them.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gru_gates_bwd_kernel(const T* __restrict__ grad,  // [B, H]
                         const T* __restrict__ gi,    // [B, 3H]
                         const T* __restrict__ gh,    // [B, 3H]
                         const T* __restrict__ h,     // [B, H]
                         T* __restrict__ d_gi,        // [B, 3H]
                         T* __restrict__ d_gh,        // [B, 3H]
                         T* __restrict__ d_h,         // [B, H]
                         int64_t H) {
  const int64_t b = blockIdx.x, c = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * V;
  if (c >= H) return;
  const int64_t gate = b * 3 * H + c;
  float r[V], z[V], n[V], hr[V], hz[V], hn[V], h0[V], g[V];
  load(r, gi + gate), load(z, gi + gate + H), load(n, gi + gate + 2 * H);
  load(hr, gh + gate), load(hz, gh + gate + H), load(hn, gh + gate + 2 * H);
  load(h0, h + b * H + c), load(g, grad + b * H + c);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float ri = sigmoid(r[i] + hr[i]), zi = sigmoid(z[i] + hz[i]);
    const float ni = tanhf(n[i] + ri * hn[i]);
    const float d_n = g[i] * (1.f - zi) * (1.f - ni * ni);
    r[i] = d_n * hn[i] * ri * (1.f - ri);
    z[i] = g[i] * (h0[i] - ni) * zi * (1.f - zi);
    n[i] = d_n;
    hn[i] = d_n * ri;
    h0[i] = g[i] * zi;
  }
  store(d_gi + gate, r), store(d_gi + gate + H, z), store(d_gi + gate + 2 * H, n);
  store(d_gh + gate, r), store(d_gh + gate + H, z), store(d_gh + gate + 2 * H, hn);
  store(d_h + b * H + c, h0);
}

// Vectors of four need every row to start on a multiple of four values; torch's allocations do.
template <int V>
dim3 grid(int64_t B, int64_t H) {
  return dim3(unsigned(B), unsigned((H + V * kThreads - 1) / (V * kThreads)));
}

bool aligned(int64_t H, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return H % 4 == 0;
}

template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}

template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}

}  // namespace

cudaError_t gru_gates_fwd(DType dtype, const void* gi, const void* gh, const void* h, void* out,
                          int64_t B, int64_t H, cudaStream_t s) {
  if (B == 0 || H == 0) return cudaSuccess;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    if (aligned(H, {gi, gh, h, out}))
      gru_gates_fwd_kernel<T, 4>
          <<<grid<4>(B, H), kThreads, 0, s>>>(as<T>(gi), as<T>(gh), as<T>(h), as<T>(out), H);
    else
      gru_gates_fwd_kernel<T, 1>
          <<<grid<1>(B, H), kThreads, 0, s>>>(as<T>(gi), as<T>(gh), as<T>(h), as<T>(out), H);
    return cudaGetLastError();
  });
}

cudaError_t gru_gates_bwd(DType dtype, const void* grad, const void* gi, const void* gh,
                          const void* h, void* d_gi, void* d_gh, void* d_h, int64_t B, int64_t H,
                          cudaStream_t s) {
  if (B == 0 || H == 0) return cudaSuccess;
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    if (aligned(H, {grad, gi, gh, h, d_gi, d_gh, d_h}))
      gru_gates_bwd_kernel<T, 4><<<grid<4>(B, H), kThreads, 0, s>>>(
          as<T>(grad), as<T>(gi), as<T>(gh), as<T>(h), as<T>(d_gi), as<T>(d_gh), as<T>(d_h), H);
    else
      gru_gates_bwd_kernel<T, 1><<<grid<1>(B, H), kThreads, 0, s>>>(
          as<T>(grad), as<T>(gi), as<T>(gh), as<T>(h), as<T>(d_gi), as<T>(d_gh), as<T>(d_h), H);
    return cudaGetLastError();
  });
}

}  // namespace diwa::cuda
