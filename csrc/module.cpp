// diwa._C: what was built and which instruction set runs. No operator passes through here.
#include <pybind11/pybind11.h>

#include "diwa/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cxx"] = static_cast<long>(__cplusplus);
        return info;
      },
      "Compiler and C++ standard the native libraries were built with.");
  m.def(
      "cpu_isa", [] { return diwa_cpu_isa(); },
      "Instruction set in force: base, avx2, avx512 or avx512_bf16.");
  m.def(
      "set_cpu_isa",
      [](const char* name) {
        switch (diwa_set_cpu_isa(name)) {
          case 1:
            throw py::value_error("cpu isa must be base, avx2, avx512 or avx512_bf16");
          case 2:
            throw py::value_error("this processor does not have that instruction set");
        }
      },
      py::arg("name"),
      "Run the CPU kernels on this instruction set: base, avx2, avx512 or avx512_bf16.");
}
