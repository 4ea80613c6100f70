// AVX-512: 16 of 32 registers hold sums.
#if defined(__x86_64__)
#define EFLAT_TARGET avx512
#define EFLAT_LANES 8
#define EFLAT_VECTORS 4
#include <math.h>  // before the target changes: none of it may be compiled for avx512
#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c")
#endif
#include "adamw.inl"
#include "kernels.h"
#include "kernels.inl"

namespace eflat::cpu {
const Kernels kAvx512 = table("avx512");
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
