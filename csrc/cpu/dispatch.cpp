// Which of the compiled instruction sets this processor runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace eflat::cpu {

static const Kernels& choose() {
  const char* wanted = std::getenv("EFLAT_CPU");
  auto allowed = [wanted](const Kernels& k) {
    return wanted == nullptr || std::strcmp(wanted, k.name) == 0;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && allowed(kAvx512)) return kAvx512;
  if (avx2 && allowed(kAvx2)) return kAvx2;
#endif
  return kBaseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace eflat::cpu
