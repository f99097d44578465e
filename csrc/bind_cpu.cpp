// Operator schemas and their CPU implementations. A new operator may add its own bind_cpu_*.cpp.
#include "diwa/binding.h"
#include "diwa/gru_gates.h"

namespace diwa {
namespace {

void check_gru_gates(const Tensor& gi, const Tensor& gh, const Tensor& h) {
  STD_TORCH_CHECK(h.dim() == 2, "gru_gates: h must be [B, H]");
  for (const Tensor* t : {&gi, &gh})
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == h.size(0) && t->size(1) == 3 * h.size(1),
                    "gru_gates: gi and gh must be [B, 3H]");
  for (const Tensor* t : {&gi, &gh, &h})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "gru_gates: float32 only on the CPU");
}

Tensor gru_gates_fwd_cpu(const Tensor& gi, const Tensor& gh, const Tensor& h) {
  check_gru_gates(gi, gh, h);
  const Tensor gi_c = contig(gi), gh_c = contig(gh), h_c = contig(h);
  Tensor out = torch::stable::empty_like(h_c);
  const GruGatesArgs args{f32(gi_c), f32(gh_c), f32(h_c), f32_out(out), h.size(1)};
  const auto kernel = gru_gates_fwd_kernel();
  for_rows(h.size(0), 3 * h.size(1), [&](int64_t r0, int64_t r1) { kernel(args, r0, r1); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_gates_bwd_cpu(const Tensor& grad, const Tensor& gi,
                                                     const Tensor& gh, const Tensor& h) {
  check_gru_gates(gi, gh, h);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == h.size(0) && grad.size(1) == h.size(1) &&
                      grad.scalar_type() == ScalarType::Float,
                  "gru_gates: grad must be float32 [B, H]");
  const Tensor grad_c = contig(grad), gi_c = contig(gi), gh_c = contig(gh), h_c = contig(h);
  Tensor d_gi = torch::stable::empty_like(gi_c), d_gh = torch::stable::empty_like(gh_c),
         d_h = torch::stable::empty_like(h_c);
  const GruGatesBwdArgs args{f32(grad_c),   f32(gi_c),     f32(gh_c),    f32(h_c),
                             f32_out(d_gi), f32_out(d_gh), f32_out(d_h), h.size(1)};
  const auto kernel = gru_gates_bwd_kernel();
  for_rows(h.size(0), 6 * h.size(1), [&](int64_t r0, int64_t r1) { kernel(args, r0, r1); });
  return {d_gi, d_gh, d_h};
}

}  // namespace
}  // namespace diwa

STABLE_TORCH_LIBRARY_FRAGMENT(diwa, m) {
  m.def("gru_gates_fwd(Tensor gi, Tensor gh, Tensor h) -> Tensor");
  m.def("gru_gates_bwd(Tensor grad, Tensor gi, Tensor gh, Tensor h) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diwa, CPU, m) {
  m.impl("gru_gates_fwd", TORCH_BOX(&diwa::gru_gates_fwd_cpu));
  m.impl("gru_gates_bwd", TORCH_BOX(&diwa::gru_gates_bwd_cpu));
}
