// Schema of denoise_chain_cluster and its CUDA implementation.
#include <vector>

#include "diwa/binding_cuda.h"
#include "diwa/denoise_chain_cuda.h"

namespace diwa {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check(bool ok, const char* message) {
  STD_TORCH_CHECK(ok, "denoise_chain_cluster: ", message);
}

// Contiguous, aligned for 16-byte accesses, on the device of `like`.
const void* checked(const Tensor& t, const char* name, ScalarType type, int64_t size,
                    const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(),
                  "denoise_chain_cluster: ", name, " must be on the device of noise");
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == type && t.numel() == size,
                  "denoise_chain_cluster: ", name, " must be contiguous, of ", size,
                  type == ScalarType::BFloat16 ? " bfloat16" : " float32", " values");
  const void* p = t.const_data_ptr();
  STD_TORCH_CHECK(size == 0 || reinterpret_cast<uintptr_t>(p) % 16 == 0,
                  "denoise_chain_cluster: ", name, " must start on a multiple of 16 bytes");
  return p;
}

// tensors: chunk_in, time, hidden1, bias1, hidden2, bias2, out, out_bias
cuda::ChainNetwork network(const std::vector<Tensor>& t, const Tensor& cond,
                           const cuda::ChainArgs& a, const Tensor& like) {
  check(t.size() == 8, "a network has 8 tensors");
  const auto half = ScalarType::BFloat16, full = ScalarType::Float;
  const int64_t W = a.W, P = a.P;
  const auto floats = [&](const Tensor& x, const char* name, int64_t size) {
    return static_cast<const float*>(checked(x, name, full, size, like));
  };
  return {checked(t[0], "chunk_in", half, W * P, like),
          floats(t[1], "time", a.K * W),
          checked(t[2], "hidden1", half, W * W, like),
          floats(t[3], "bias1", W),
          checked(t[4], "hidden2", half, W * W, like),
          floats(t[5], "bias2", W),
          checked(t[6], "out", half, P * W, like),
          floats(t[7], "out_bias", P),
          floats(cond, "cond", a.N * W)};
}

std::tuple<Tensor, Tensor, Tensor> denoise_chain_cluster(
    const Tensor& noise, const Tensor& cond_base, const Tensor& cond_tuned,
    const std::vector<Tensor>& base, const std::vector<Tensor>& tuned, const Tensor& steps,
    int64_t base_steps, int64_t ft_steps, double clip_noise) {
  check(noise.dim() == 3 && noise.size(0) >= 2, "noise must be [K + 1, N, P]");
  check(cond_tuned.dim() == 2, "cond must be [N, W]");
  cuda::ChainArgs a{};
  a.N = noise.size(1);
  a.K = static_cast<int>(noise.size(0)) - 1, a.P = static_cast<int>(noise.size(2));
  a.W = static_cast<int>(cond_tuned.size(1));
  check(0 <= base_steps && base_steps <= a.K, "base_steps must lie in [0, K]");
  check(0 <= ft_steps && ft_steps <= a.K, "ft_steps must lie in [0, K]");
  a.base_steps = static_cast<int>(base_steps), a.ft_steps = static_cast<int>(ft_steps);
  a.clip_noise = static_cast<float>(clip_noise);
  const DeviceGuard guard(noise.get_device_index());
  const char* problem = cuda::denoise_chain_problem(a);
  STD_TORCH_CHECK(!problem, "denoise_chain_cluster: ", problem);
  const auto full = ScalarType::Float;
  const Tensor noise_c = contig(noise);
  a.noise = static_cast<const float*>(checked(noise_c, "noise", full, noise.numel(), noise));
  a.table = static_cast<const float*>(checked(steps, "steps", full, int64_t(a.K) * 7, noise));
  a.net[0] = network(base, cond_base, a, noise);
  a.net[1] = network(tuned, cond_tuned, a, noise);
  const auto out = [&](int64_t n) { return torch::stable::new_empty(noise_c, {a.N, n, a.P}); };
  Tensor chunk = torch::stable::new_empty(noise_c, {a.N, a.P});
  Tensor chain = out(ft_steps ? ft_steps + 1 : 0), log_prob = out(ft_steps);
  a.chunk = f32_out(chunk), a.chain = f32_out(chain), a.log_prob = f32_out(log_prob);
  check_launch("denoise_chain_cluster", cuda::denoise_chain(a, current_stream(noise)));
  return {chunk, chain, log_prob};
}

}  // namespace
}  // namespace diwa

STABLE_TORCH_LIBRARY_FRAGMENT(diwa, m) {
  m.def(
      "denoise_chain_cluster(Tensor noise, Tensor cond_base, Tensor cond_tuned, Tensor[] base, "
      "Tensor[] tuned, Tensor steps, int base_steps, int ft_steps, float clip_noise) -> (Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diwa, CUDA, m) {
  m.impl("denoise_chain_cluster", TORCH_BOX(&diwa::denoise_chain_cluster));
}
