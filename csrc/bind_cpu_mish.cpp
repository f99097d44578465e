// Schema of mish and its CPU implementation.
#include "diwa/binding.h"
#include "diwa/mish.h"

namespace diwa {
namespace {

Tensor mish_fwd_cpu(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "mish: float32 only on the CPU");
  const Tensor x_c = contig(x);
  Tensor out = torch::stable::empty_like(x_c);
  const MishArgs args{f32(x_c), f32_out(out)};
  const auto kernel = mish_fwd_kernel();
  for_rows(x_c.numel(), 1, [&](int64_t i0, int64_t i1) { kernel(args, i0, i1); });
  return out;
}

Tensor mish_bwd_cpu(const Tensor& grad, const Tensor& x) {
  for (const Tensor* t : {&grad, &x})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "mish: float32 only on the CPU");
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = grad.size(i) == x.size(i);
  STD_TORCH_CHECK(same, "mish: grad must have the shape of x");
  const Tensor grad_c = contig(grad), x_c = contig(x);
  Tensor d_x = torch::stable::empty_like(x_c);
  const MishBwdArgs args{f32(grad_c), f32(x_c), f32_out(d_x)};
  const auto kernel = mish_bwd_kernel();
  for_rows(x_c.numel(), 1, [&](int64_t i0, int64_t i1) { kernel(args, i0, i1); });
  return d_x;
}

}  // namespace
}  // namespace diwa

STABLE_TORCH_LIBRARY_FRAGMENT(diwa, m) {
  m.def("mish_fwd(Tensor x) -> Tensor");
  m.def("mish_bwd(Tensor grad, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diwa, CPU, m) {
  m.impl("mish_fwd", TORCH_BOX(&diwa::mish_fwd_cpu));
  m.impl("mish_bwd", TORCH_BOX(&diwa::mish_bwd_cpu));
}
