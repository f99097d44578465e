// Schema of the prior steps and their CPU implementation.
#include "diwa/binding_rssm.h"
#include "diwa/rssm_imagine.h"

namespace diwa {
namespace {

constexpr const char* kName = "rssm_imagine";

void check_indices(const Tensor& z_idx, int64_t C) {
  const auto* z = static_cast<const int64_t*>(z_idx.const_data_ptr());
  for (int64_t i = 0; i < z_idx.numel(); ++i)
    STD_TORCH_CHECK(z[i] >= -1 && z[i] < C, kName, ": z_idx holds ", z[i], ", not in [0, ", C, ")");
}

// packed: w_ih, w_hh, head, out. vectors: cell bias, gain and shift, b_ih, b_hh, head bias, gain
// and shift, out bias.
std::tuple<Tensor, Tensor, Tensor> rssm_imagine_cpu(const Tensor& h, const Tensor& z_idx,
                                                    const Tensor& actions, const Tensor& uniforms,
                                                    const Tensor& table, const Tensor& cell_a,
                                                    Tensors packed, Tensors vectors,
                                                    double temperature, double unimix, double eps,
                                                    bool return_features) {
  STD_TORCH_CHECK(h.dim() == 2, kName, ": h must be float32 [N, H]");
  STD_TORCH_CHECK(actions.dim() == 3, kName, ": actions must be float32 [L, N, A]");
  STD_TORCH_CHECK(uniforms.dim() == 3, kName, ": uniforms must be float32 [L, N, S]");
  STD_TORCH_CHECK(table.dim() == 2, kName, ": table must be float32 [Z, U]");
  STD_TORCH_CHECK(packed.size() == 4 && vectors.size() == 9, kName, ": 4 packed, 9 vectors");
  STD_TORCH_CHECK(temperature > 0, kName, ": temperature must be positive");
  const int64_t N = h.size(0), H = h.size(1), L = actions.size(0), A = actions.size(2),
                S = uniforms.size(2), Z = table.size(0), U = table.size(1);
  STD_TORCH_CHECK(S > 0 && Z % S == 0, kName, ": Z must be a multiple of S");
  DIWA_CHECK(h, N, H);
  DIWA_CHECK(actions, L, N, A);
  DIWA_CHECK(uniforms, L, N, S);
  DIWA_CHECK(table, Z, U);
  DIWA_CHECK(cell_a, A, U);
  STD_TORCH_CHECK(z_idx.scalar_type() == ScalarType::Long && has_shape(z_idx, {N, S}), kName,
                  ": z_idx must be int64 [N, S]");
  const bool bf16 = packed[0].scalar_type() == ScalarType::BFloat16;
  check_packed(kName, "w_ih", packed[0], 3 * H, U, bf16);
  check_packed(kName, "w_hh", packed[1], 3 * H, H, bf16);
  check_packed(kName, "head", packed[2], U, H, bf16);
  check_packed(kName, "out", packed[3], Z, U, bf16);
  const int64_t sizes[] = {U, U, U, 3 * H, 3 * H, U, U, U, Z};
  const char* names[] = {"cell_bias", "cell_gain", "cell_shift", "b_ih",    "b_hh",
                         "head_bias", "head_gain", "head_shift", "out_bias"};
  for (size_t i = 0; i < 9; ++i) check_vector(kName, names[i], vectors[i], sizes[i]);
  const Tensors in = contiguous({h, z_idx, actions, uniforms, table, cell_a});
  const Tensors v = contiguous(vectors);
  check_indices(in[1], Z / S);
  Tensor h_out = torch::stable::new_empty(in[0], {L, N, H});
  Tensor z_out = torch::stable::new_empty(in[1], {L, N, S});
  Tensor features = torch::stable::new_empty(in[0], {return_features ? L : 0, N, H + Z});
  RSSMImagineArgs args{};
  args.L = L, args.N = N, args.H = H, args.U = U, args.S = S, args.C = Z / S, args.A = A;
  args.sharpness = static_cast<float>(1 / temperature);
  args.unimix = static_cast<float>(unimix), args.eps = static_cast<float>(eps);
  args.h0 = f32(in[0]), args.z0 = static_cast<const int64_t*>(in[1].const_data_ptr());
  args.actions = f32(in[2]), args.uniforms = f32(in[3]);
  args.table = f32(in[4]), args.cell_a = f32(in[5]);
  args.cell_bias = f32(v[0]), args.cell_gain = f32(v[1]), args.cell_shift = f32(v[2]);
  args.b_ih = f32(v[3]), args.b_hh = f32(v[4]);
  args.head_bias = f32(v[5]), args.head_gain = f32(v[6]), args.head_shift = f32(v[7]);
  args.out_bias = f32(v[8]);
  args.w_ih = packed[0].const_data_ptr(), args.w_hh = packed[1].const_data_ptr();
  args.head = packed[2].const_data_ptr(), args.out = packed[3].const_data_ptr();
  args.h = f32_out(h_out), args.z = static_cast<int64_t*>(z_out.mutable_data_ptr());
  args.features = return_features ? f32_out(features) : nullptr;
  const auto kernel = bf16 ? rssm_imagine_bf16_kernel() : rssm_imagine_f32_kernel();
  for_tiles<64, 4>(
      L ? N : 0, [&](int64_t R) { return rssm_imagine_scratch(R, H, U, S, Z / S); },
      [&](int64_t r0, int64_t r1, float* scratch) { kernel(args, r0, r1, scratch); });
  return {h_out, z_out, features};
}

}  // namespace
}  // namespace diwa

STABLE_TORCH_LIBRARY_FRAGMENT(diwa, m) {
  m.def(
      "rssm_imagine(Tensor h, Tensor z_idx, Tensor actions, Tensor uniforms, Tensor table, "
      "Tensor cell_a, Tensor[] packed, Tensor[] vectors, float temperature, float unimix, "
      "float eps, bool return_features) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diwa, CPU, m) {
  m.impl("rssm_imagine", TORCH_BOX(&diwa::rssm_imagine_cpu));
}
