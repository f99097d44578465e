#include "diwa/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace diwa {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!wide) return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

int by_name(const char* name) {
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(name, kNames[i])) return i;
  return -1;
}

// DIWA_CPU can only lower the level: a name this processor cannot run is ignored.
std::atomic<int>& level() {
  static std::atomic<int> current = [] {
    const int best = best_level();
    const char* env = std::getenv("DIWA_CPU");
    const int wanted = env ? by_name(env) : -1;
    return wanted >= 0 && wanted < best ? wanted : best;
  }();
  return current;
}

}  // namespace

int isa_level() { return level().load(std::memory_order_relaxed); }

}  // namespace diwa

DIWA_API const char* diwa_cpu_isa() { return diwa::kNames[diwa::isa_level()]; }

DIWA_API int diwa_set_cpu_isa(const char* name) {
  const int wanted = diwa::by_name(name);
  if (wanted < 0) return 1;
  if (wanted > diwa::best_level()) return 2;
  diwa::level().store(wanted);
  return 0;
}
