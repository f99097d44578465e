// Schema of the posterior scan and its CPU implementation.
#include "diwa/binding_rssm.h"
#include "diwa/rssm_observe.h"

namespace diwa {
namespace {

constexpr const char* kName = "rssm_observe";

// packed: w_ih, w_hh, head, out. vectors: cell gain and shift, b_ih, b_hh, head gain and shift, out
// bias.
Tensors rssm_observe_fwd_cpu(const Tensor& embed, const Tensor& action, const Tensor& first,
                             const Tensor& keep, const Tensor& h0, const Tensor& uniform,
                             const Tensor& table, Tensors packed, Tensors vectors, double unimix,
                             double eps, bool save) {
  STD_TORCH_CHECK(embed.dim() == 3, "rssm_observe: embed must be float32 [T, B, U]");
  STD_TORCH_CHECK(h0.dim() == 2, "rssm_observe: h0 must be float32 [B, H]");
  STD_TORCH_CHECK(uniform.dim() == 3, "rssm_observe: uniform must be float32 [T, B, S]");
  STD_TORCH_CHECK(table.dim() == 2, "rssm_observe: table must be float32 [Z, U]");
  STD_TORCH_CHECK(packed.size() == 4 && vectors.size() == 7, "rssm_observe: 4 packed, 7 vectors");
  const int64_t T = embed.size(0), B = embed.size(1), U = embed.size(2), H = h0.size(1),
                S = uniform.size(2), Z = table.size(0);
  STD_TORCH_CHECK(S > 0 && Z % S == 0, "rssm_observe: Z must be a multiple of S");
  DIWA_CHECK(embed, T, B, U);
  DIWA_CHECK(action, T, B, U);
  DIWA_CHECK(first, B, U);
  DIWA_CHECK(keep, T, B);
  DIWA_CHECK(h0, B, H);
  DIWA_CHECK(uniform, T, B, S);
  DIWA_CHECK(table, Z, U);
  const bool bf16 = packed[0].scalar_type() == ScalarType::BFloat16;
  check_packed(kName, "w_ih", packed[0], 3 * H, U, bf16);
  check_packed(kName, "w_hh", packed[1], 3 * H, H, bf16);
  check_packed(kName, "head", packed[2], U, H, bf16);
  check_packed(kName, "out", packed[3], Z, U, bf16);
  const int64_t sizes[] = {U, U, 3 * H, 3 * H, U, U, Z};
  const char* names[] = {"cell_gain", "cell_shift", "b_ih",    "b_hh",
                         "head_gain", "head_shift", "out_bias"};
  for (size_t i = 0; i < 7; ++i) check_vector(kName, names[i], vectors[i], sizes[i]);
  const Tensors in = contiguous({embed, action, first, keep, h0, uniform, table});
  const Tensors v = contiguous(vectors);
  const int64_t saved = save ? T : std::min<int64_t>(T, 1);
  const auto empty = [&](int64_t frames, int64_t width) {
    return torch::stable::new_empty(in[0], {frames, B, width});
  };
  Tensors out = {empty(T, H),     empty(T, Z),         empty(T, Z),     empty(saved, U),
                 empty(saved, U), empty(saved, 4 * H), empty(saved, U), empty(saved, U)};
  const RSSMObserveArgs args{T,
                             B,
                             H,
                             U,
                             S,
                             Z / S,
                             static_cast<float>(unimix),
                             static_cast<float>(eps),
                             f32(in[0]),
                             f32(in[1]),
                             f32(in[2]),
                             f32(in[3]),
                             f32(in[4]),
                             f32(in[5]),
                             f32(in[6]),
                             f32(v[0]),
                             f32(v[1]),
                             f32(v[2]),
                             f32(v[3]),
                             f32(v[4]),
                             f32(v[5]),
                             f32(v[6]),
                             packed[0].const_data_ptr(),
                             packed[1].const_data_ptr(),
                             packed[2].const_data_ptr(),
                             packed[3].const_data_ptr(),
                             f32_out(out[0]),
                             f32_out(out[1]),
                             f32_out(out[2]),
                             f32_out(out[3]),
                             f32_out(out[4]),
                             f32_out(out[5]),
                             f32_out(out[6]),
                             f32_out(out[7]),
                             saved};
  const auto kernel = bf16 ? rssm_observe_fwd_bf16_kernel() : rssm_observe_fwd_f32_kernel();
  for_tiles<64, 4>(
      T ? B : 0, [&](int64_t R) { return rssm_observe_scratch(R, H, U, Z); },
      [&](int64_t r0, int64_t r1, float* scratch) { kernel(args, r0, r1, scratch); });
  return out;
}

// saved: h, logits, x, a, gates, y, b of the forward pass. packed: transposes of out, head, w_ih
// (rows in the order n, r, z), w_hh and cell_z. vectors: cell gain and shift, head gain and shift.
Tensors rssm_observe_bwd_cpu(const Tensor& g_h, const Tensor& g_z, const Tensor& g_logits,
                             const Tensor& keep, const Tensor& h0, Tensors saved, Tensors packed,
                             Tensors vectors, int64_t groups, double unimix, double eps) {
  STD_TORCH_CHECK(saved.size() == 7 && packed.size() == 5 && vectors.size() == 4,
                  "rssm_observe: 7 saved, 5 packed, 4 vectors");
  STD_TORCH_CHECK(g_h.dim() == 3 && g_z.dim() == 3, "rssm_observe: g_h must be [T, B, H]");
  const int64_t T = g_h.size(0), B = g_h.size(1), H = g_h.size(2), Z = g_z.size(2),
                U = vectors[0].size(0);
  STD_TORCH_CHECK(groups > 0 && Z % groups == 0, "rssm_observe: Z must be a multiple of S");
  DIWA_CHECK(g_h, T, B, H);
  DIWA_CHECK(g_z, T, B, Z);
  DIWA_CHECK(g_logits, T, B, Z);
  DIWA_CHECK(keep, T, B);
  DIWA_CHECK(h0, B, H);
  const int64_t widths[] = {H, Z, U, U, 4 * H, U, U};
  for (size_t i = 0; i < 7; ++i)
    STD_TORCH_CHECK(
        saved[i].scalar_type() == ScalarType::Float && has_shape(saved[i], {T, B, widths[i]}),
        "rssm_observe: a saved tensor must be float32 [T, B, ", widths[i], "]");
  for (const Tensor& t : vectors) check_vector(kName, "a norm", t, U);
  const bool bf16 = packed[0].scalar_type() == ScalarType::BFloat16;
  check_packed(kName, "out", packed[0], U, Z, bf16);
  check_packed(kName, "head", packed[1], H, U, bf16);
  check_packed(kName, "w_ih", packed[2], U, 3 * H, bf16);
  check_packed(kName, "w_hh", packed[3], H, 3 * H, bf16);
  check_packed(kName, "cell_z", packed[4], Z, U, bf16);
  const Tensors in = contiguous({g_h, g_z, g_logits, keep, h0});
  const Tensors s = contiguous(saved), v = contiguous(vectors);
  const auto empty = [&](int64_t width) { return torch::stable::new_empty(in[0], {T, B, width}); };
  Tensors out = {empty(U),
                 empty(U),
                 empty(4 * H),
                 empty(Z),
                 torch::stable::new_zeros(in[0], {B, H}),
                 torch::stable::new_zeros(in[0], {B, Z}),
                 torch::stable::new_zeros(in[0], {B, 4 * U})};
  const RSSMObserveBwdArgs args{T,
                                B,
                                H,
                                U,
                                groups,
                                Z / groups,
                                static_cast<float>(unimix),
                                static_cast<float>(eps),
                                f32(in[0]),
                                f32(in[1]),
                                f32(in[2]),
                                f32(in[3]),
                                f32(in[4]),
                                f32(s[0]),
                                f32(s[1]),
                                f32(s[2]),
                                f32(s[3]),
                                f32(s[4]),
                                f32(s[5]),
                                f32(s[6]),
                                f32(v[0]),
                                f32(v[1]),
                                f32(v[2]),
                                f32(v[3]),
                                packed[0].const_data_ptr(),
                                packed[1].const_data_ptr(),
                                packed[2].const_data_ptr(),
                                packed[3].const_data_ptr(),
                                packed[4].const_data_ptr(),
                                f32_out(out[0]),
                                f32_out(out[1]),
                                f32_out(out[2]),
                                f32_out(out[3]),
                                f32_out(out[4]),
                                f32_out(out[5]),
                                f32_out(out[6])};
  const auto kernel = bf16 ? rssm_observe_bwd_bf16_kernel() : rssm_observe_bwd_f32_kernel();
  for_tiles<64, 4>(
      B, [&](int64_t R) { return rssm_observe_scratch(R, H, U, Z); },
      [&](int64_t r0, int64_t r1, float* scratch) { kernel(args, r0, r1, scratch); });
  return out;
}

}  // namespace
}  // namespace diwa

STABLE_TORCH_LIBRARY_FRAGMENT(diwa, m) {
  m.def(
      "rssm_observe_fwd(Tensor embed, Tensor action, Tensor first, Tensor keep, Tensor h0, "
      "Tensor uniform, Tensor table, Tensor[] packed, Tensor[] vectors, float unimix, float eps, "
      "bool save) -> Tensor[]");
  m.def(
      "rssm_observe_bwd(Tensor g_h, Tensor g_z, Tensor g_logits, Tensor keep, Tensor h0, "
      "Tensor[] saved, Tensor[] packed, Tensor[] vectors, int groups, float unimix, float eps) "
      "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(diwa, CPU, m) {
  m.impl("rssm_observe_fwd", TORCH_BOX(&diwa::rssm_observe_fwd_cpu));
  m.impl("rssm_observe_bwd", TORCH_BOX(&diwa::rssm_observe_bwd_cpu));
}
