// Chooses the best compiled instruction set that this processor runs.
#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace eflat::cpu {

static const Kernels& choose() {
  [[maybe_unused]] const std::string_view most =
      std::getenv("EFLAT_CPU") ? std::getenv("EFLAT_CPU") : "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (avx512 && most != "avx2" && most != "baseline") return kAvx512;
  if (avx2 && most != "baseline") return kAvx2;
#endif
  return kBaseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace eflat::cpu
