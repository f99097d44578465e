#pragma once
// Which instruction set the CPU kernels run on, and the macro that declares a kernel for each.
#define DIWA_API extern "C" __attribute__((visibility("default")))

DIWA_API const char* diwa_cpu_isa();              // one of those below
DIWA_API int diwa_set_cpu_isa(const char* name);  // 0 ok; 1 unknown name; 2 this processor cannot

namespace diwa {
int isa_level();  // 0 base, 1 avx2, 2 avx512, 3 avx512_bf16
}

// DIWA_KERNEL(name, parameters...) in a header declares void name(parameters...). A kernel file,
// compiled once per instruction set, sees the one it defines. A binding sees all of them and gets
// name_kernel(), the function for the instruction set in force.
#if defined(DIWA_ISA)
#define DIWA_KERNEL(name, ...) \
  namespace diwa {             \
  namespace DIWA_ISA {         \
  void name(__VA_ARGS__);      \
  }                            \
  }
#elif defined(__x86_64__)
#define DIWA_KERNEL(name, ...)                                                  \
  namespace diwa {                                                              \
  namespace base {                                                              \
  void name(__VA_ARGS__);                                                       \
  }                                                                             \
  namespace avx2 {                                                              \
  void name(__VA_ARGS__);                                                       \
  }                                                                             \
  namespace avx512 {                                                            \
  void name(__VA_ARGS__);                                                       \
  }                                                                             \
  namespace avx512_bf16 {                                                       \
  void name(__VA_ARGS__);                                                       \
  }                                                                             \
  inline auto name##_kernel() -> void (*)(__VA_ARGS__) {                        \
    void (*const table[])(__VA_ARGS__) = {base::name, avx2::name, avx512::name, \
                                          avx512_bf16::name};                   \
    return table[isa_level()];                                                  \
  }                                                                             \
  }
#else
#define DIWA_KERNEL(name, ...)                                                \
  namespace diwa {                                                            \
  namespace base {                                                            \
  void name(__VA_ARGS__);                                                     \
  }                                                                           \
  inline auto name##_kernel() -> void (*)(__VA_ARGS__) { return base::name; } \
  }
#endif
