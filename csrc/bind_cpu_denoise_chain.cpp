// Schema of denoise_chain and its CPU implementation.
#include <optional>
#include <tuple>
#include <vector>

#include "diwa/binding_tiles.h"
#include "diwa/denoise_chain.h"

namespace diwa {
namespace {

void check(bool ok, const char* message) { STD_TORCH_CHECK(ok, "denoise_chain: ", message); }

void check_size(const Tensor& t, const char* net, const char* name, ScalarType type, int64_t size) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.numel() == size,
                  "denoise_chain: ", net, ".", name, " must be a contiguous CPU tensor of ", size,
                  " ", type == ScalarType::BFloat16 ? "bfloat16" : "float32", " values, got ",
                  t.numel());
}

// A network's tensors and the arrays of pointers that the kernel wants.
struct Net {
  ChainNet args;
  std::vector<const void*> hidden;
  std::vector<const float*> hidden_bias;
};

// tensors: chunk_in, cond_in, table, bias, (hidden weight, hidden bias) x layers, out, out_bias
void read_net(Net& net, const std::vector<Tensor>& t, const char* name, const DenoiseChainArgs& a) {
  check(static_cast<int64_t>(t.size()) == 6 + 2 * a.layers,
        "a network has 6 tensors and 2 per hidden layer, base as many as tuned");
  const ScalarType type = t[0].scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16,
        "a network must be packed as float32 or bfloat16");
  const bool bf16 = type == ScalarType::BFloat16;
  const auto packed = [&](int64_t n, int64_t k) { return gemm::packed_values(n, k, bf16); };
  check_size(t[0], name, "chunk_in", type, packed(a.W, a.P));
  check_size(t[1], name, "cond_in", type, packed(a.W, a.D));
  check_size(t[2], name, "table", type, a.S * a.C * gemm::round_up(a.W));
  check_size(t[3], name, "bias", ScalarType::Float, a.K * a.W);
  for (int64_t i = 0; i < a.layers; ++i) {
    check_size(t[4 + 2 * i], name, "hidden", type, packed(a.W, a.W));
    check_size(t[5 + 2 * i], name, "hidden_bias", ScalarType::Float, a.W);
    net.hidden.push_back(t[4 + 2 * i].const_data_ptr());
    net.hidden_bias.push_back(f32(t[5 + 2 * i]));
  }
  const Tensor &out = t[4 + 2 * a.layers], &out_bias = t[5 + 2 * a.layers];
  check_size(out, name, "out", type, packed(a.P, a.W));
  check_size(out_bias, name, "out_bias", ScalarType::Float, a.P);
  net.args = {bf16,
              t[0].const_data_ptr(),
              t[1].const_data_ptr(),
              a.S ? t[2].const_data_ptr() : nullptr,
              f32(t[3]),
              net.hidden.data(),
              net.hidden_bias.data(),
              out.const_data_ptr(),
              f32(out_bias)};
}

void check_indices(const int64_t* index, int64_t size, int64_t classes) {
  for (int64_t i = 0; i < size; ++i)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < classes, "denoise_chain: z_idx must lie in [0, ",
                    classes, "), got ", index[i]);
}

// 84 rows are whole register tiles of 6 and of 14.
void run_tiles(const DenoiseChainArgs& a) {
  const auto kernel = denoise_chain_kernel();
  for_tiles<84, 12>(
      a.N, [&](int64_t rows) { return denoise_chain_scratch(a, rows); },
      [&](int64_t r0, int64_t r1, float* scratch) { kernel(a, r0, r1, scratch); });
}

std::tuple<Tensor, Tensor, Tensor> denoise_chain_cpu(
    const Tensor& noise, const Tensor& cond, const std::optional<Tensor>& z_idx,
    const std::vector<Tensor>& base, const std::vector<Tensor>& tuned, const Tensor& steps,
    int64_t base_steps, int64_t ft_steps, double clip_noise, bool residual) {
  const auto matrix = [](const Tensor& t, int64_t dim) {
    return t.is_cpu() && t.dim() == dim && t.scalar_type() == ScalarType::Float;
  };
  check(matrix(noise, 3), "noise must be float32 [K + 1, N, P] on the CPU");
  check(matrix(cond, 2) && cond.size(0) == noise.size(1),
        "cond must be float32 [N, D] on the CPU, with the N of noise");
  DenoiseChainArgs a{};
  a.K = noise.size(0) - 1, a.N = noise.size(1), a.P = noise.size(2), a.D = cond.size(1);
  check(a.K >= 1 && a.P >= 1 && a.D >= 1, "noise needs a step and a number, cond a column");
  check(matrix(steps, 2) && steps.size(0) == a.K && steps.size(1) == 7,
        "steps must be float32 [K, 7]");
  check(0 <= ft_steps && ft_steps <= a.K, "ft_steps must lie in [0, K]");
  check(0 <= base_steps && base_steps <= a.K, "base_steps must lie in [0, K]");
  check(tuned.size() >= 6 && tuned.size() % 2 == 0,
        "tuned must have 6 tensors and 2 per hidden layer");
  check(tuned[3].dim() == 2 && tuned[3].size(1) >= 1, "tuned.bias must be [K, W]");
  a.W = tuned[3].size(1), a.layers = static_cast<int64_t>(tuned.size()) / 2 - 3;
  check(!residual || a.layers % 2 == 0, "a residual network has an even number of hidden layers");
  const Tensor noise_c = contig(noise), cond_c = contig(cond), steps_c = contig(steps);
  const Tensor index_c = z_idx ? contig(*z_idx) : noise_c;
  if (z_idx) {
    check(z_idx->is_cpu() && z_idx->dim() == 2 && z_idx->size(0) == a.N && z_idx->size(1) >= 1 &&
              z_idx->scalar_type() == ScalarType::Long,
          "z_idx must be int64 [N, S] on the CPU, with the N of noise");
    a.S = z_idx->size(1);
    const int64_t rows = tuned[2].numel() / gemm::round_up(a.W);
    a.C = rows / a.S;
    check(a.C >= 1 && a.C * a.S == rows, "tuned.table must have S * C rows");
    a.z_idx = static_cast<const int64_t*>(index_c.const_data_ptr());
    check_indices(a.z_idx, a.N * a.S, a.C);
  }
  Net base_net, tuned_net;
  read_net(tuned_net, tuned, "tuned", a);
  read_net(base_net, base, "base", a);
  a.base = base_net.args, a.tuned = tuned_net.args;
  const auto out = [&](int64_t n) { return torch::stable::new_empty(noise_c, {a.N, n, a.P}); };
  Tensor chunk = torch::stable::new_empty(noise_c, {a.N, a.P});
  Tensor chain = out(ft_steps ? ft_steps + 1 : 0), log_prob = out(ft_steps);
  a.noise = f32(noise_c), a.cond = f32(cond_c);
  a.steps = static_cast<const ChainStep*>(steps_c.const_data_ptr());
  a.chunk = f32_out(chunk), a.chain = f32_out(chain), a.log_prob = f32_out(log_prob);
  a.Kf = ft_steps, a.base_steps = base_steps;
  a.residual = residual, a.clip_noise = static_cast<float>(clip_noise);
  run_tiles(a);
  return {chunk, chain, log_prob};
}

}  // namespace
}  // namespace diwa

STABLE_TORCH_LIBRARY_FRAGMENT(diwa, m) {
  m.def(
      "denoise_chain(Tensor noise, Tensor cond, Tensor? z_idx, Tensor[] base, Tensor[] tuned, "
      "Tensor steps, int base_steps, int ft_steps, float clip_noise, bool residual) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diwa, CPU, m) {
  m.impl("denoise_chain", TORCH_BOX(&diwa::denoise_chain_cpu));
}
