// CUDA implementations of the operators whose schemas are in bind_cpu*.cpp.
#include "diwa/binding_cuda.h"
#include "diwa/gru_gates_cuda.h"

namespace diwa {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_gru_gates(const Tensor& gi, const Tensor& gh, const Tensor& h) {
  STD_TORCH_CHECK(h.dim() == 2, "gru_gates: h must be [B, H]");
  for (const Tensor* t : {&gi, &gh}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == h.size(0) && t->size(1) == 3 * h.size(1),
                    "gru_gates: gi and gh must be [B, 3H]");
    STD_TORCH_CHECK(t->scalar_type() == h.scalar_type(), "gru_gates: gi, gh, h: one dtype");
    STD_TORCH_CHECK(t->get_device_index() == h.get_device_index(),
                    "gru_gates: gi, gh, h: one device");
  }
}

Tensor gru_gates_fwd_cuda(const Tensor& gi, const Tensor& gh, const Tensor& h) {
  check_gru_gates(gi, gh, h);
  const DeviceGuard guard(h.get_device_index());
  const Tensor gi_c = contig(gi), gh_c = contig(gh), h_c = contig(h);
  Tensor out = torch::stable::empty_like(h_c);
  check_launch("gru_gates_fwd", cuda::gru_gates_fwd(storage_type("gru_gates", h),
                                                    gi_c.const_data_ptr(), gh_c.const_data_ptr(),
                                                    h_c.const_data_ptr(), out.mutable_data_ptr(),
                                                    h.size(0), h.size(1), current_stream(h)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_gates_bwd_cuda(const Tensor& grad, const Tensor& gi,
                                                      const Tensor& gh, const Tensor& h) {
  check_gru_gates(gi, gh, h);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == h.size(0) && grad.size(1) == h.size(1) &&
                      grad.scalar_type() == h.scalar_type() &&
                      grad.get_device_index() == h.get_device_index(),
                  "gru_gates: grad must be as h");
  const DeviceGuard guard(h.get_device_index());
  const Tensor grad_c = contig(grad), gi_c = contig(gi), gh_c = contig(gh), h_c = contig(h);
  Tensor d_gi = torch::stable::empty_like(gi_c), d_gh = torch::stable::empty_like(gh_c),
         d_h = torch::stable::empty_like(h_c);
  check_launch(
      "gru_gates_bwd",
      cuda::gru_gates_bwd(storage_type("gru_gates", h), grad_c.const_data_ptr(),
                          gi_c.const_data_ptr(), gh_c.const_data_ptr(), h_c.const_data_ptr(),
                          d_gi.mutable_data_ptr(), d_gh.mutable_data_ptr(), d_h.mutable_data_ptr(),
                          h.size(0), h.size(1), current_stream(h)));
  return {d_gi, d_gh, d_h};
}

}  // namespace
}  // namespace diwa

STABLE_TORCH_LIBRARY_IMPL(diwa, CUDA, m) {
  m.impl("gru_gates_fwd", TORCH_BOX(&diwa::gru_gates_fwd_cuda));
  m.impl("gru_gates_bwd", TORCH_BOX(&diwa::gru_gates_bwd_cuda));
}
