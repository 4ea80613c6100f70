// AVX2 and FMA: 8 of 16 registers hold sums.
#if defined(__x86_64__)
#define EFLAT_TARGET avx2
#define EFLAT_LANES 4
#define EFLAT_VECTORS 2
#include <math.h>  // before the target changes: none of it may be compiled for avx2
#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "adamw.inl"
#include "kernels.h"
#include "kernels.inl"

namespace eflat::cpu {
const Kernels kAvx2 = table("avx2");
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
