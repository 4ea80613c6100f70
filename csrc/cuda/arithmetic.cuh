// The multiply-adds of the kernels: a warp's d (8, 8) += a (8, 4) b (4, 8), as good as float64's.
//
// The mma instruction fixes the entry that a lane holds; with g = lane / 4, t = lane % 4:
//
//     a   entry (g, t)          b   entry (t, g)          d   entries (g, 2t), (g, 2t + 1)
//
// So the transpose of an a is a b, in the same register. A Gram matrix z^T z needs each element of
// z in one lane only, for both operands.
//
//     Float64    the float64 tensor cores, twice the rate of the float64 units on A100 and H100
//     TwoFloat   for cards that run float64 at 1/64 of float32's rate: products are split exactly
//                into two floats (Dekker), sums carry their rounding along (Knuth): about 10
//                float32 operations per product. Relative to the sum of magnitudes, 2^-44 after 64
//                products and, with the sum settled every 48, 2^-41 after 2048 (not settled: 2^-38)
//     Native     the one of the two that suits the architecture that is compiled for
#pragma once
#include <type_traits>

#include "cuda.h"

#if !defined(EFLAT_HOST_CUDA)
#include <cuda_fp16.h>
#endif

namespace eflat::cuda {

// Every type but float64 is exact in float32.
template <class T>
__device__ float to_float(T x) {
  return float(to_double(x));
}
#if !defined(EFLAT_HOST_CUDA)
__device__ inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
#endif

template <class T>
__device__ T from_lane(T x, int source) {
  return __shfl_sync(0xffffffffu, x, source);
}

struct Float64 {
  using Element = double;
  using Weight = double;
  struct Sum {
    double x, y;
  };
  __device__ static Sum zero() { return {0, 0}; }
  __device__ static double first(const Sum& d) { return d.x; }
  __device__ static double second(const Sum& d) { return d.y; }
  __device__ static Weight weight(double w) { return w; }
  __device__ static void settle(Sum&) {}

  __device__ static void multiply_add(Sum& d, double a, double b) {
#if defined(EFLAT_HOST_CUDA)
    struct Operands {
      double a, b;
    } all[32];
    host_cuda::warp_exchange(Operands{a, b}, all);
    const int g = lane() / 4, t = lane() % 4;
    for (int k = 0; k < 4; ++k) {
      d.x += all[4 * g + k].a * all[8 * t + k].b;
      d.y += all[4 * g + k].a * all[8 * t + 4 + k].b;
    }
#else
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d.x), "+d"(d.y)
        : "d"(a), "d"(b));
#endif
  }
};

struct TwoFloat {
  using Element = float;
  struct Weight {  // hi + lo
    float hi, lo;
  };
  struct Sum {
    Weight x, y;
  };
  __device__ static Sum zero() { return {{0, 0}, {0, 0}}; }
  __device__ static double first(const Sum& d) { return double(d.x.hi) + double(d.x.lo); }
  __device__ static double second(const Sum& d) { return double(d.y.hi) + double(d.y.lo); }
  __device__ static Weight weight(double w) {
    const float hi = float(w);
    return {hi, float(w - double(hi))};
  }

  // These are never contracted to a fused multiply-add, which would break the error terms.
#if defined(EFLAT_HOST_CUDA)
  static float multiply(float a, float b) { return a * b; }
  static float add(float a, float b) { return a + b; }
#else
  __device__ static float multiply(float a, float b) { return __fmul_rn(a, b); }
  __device__ static float add(float a, float b) { return __fadd_rn(a, b); }
#endif

  // sum += a * b
  __device__ static void add_product(Weight& sum, float a, float b) {
    const float product = multiply(a, b), product_error = fmaf(a, b, -product);
    const float total = add(sum.hi, product), part = add(total, -sum.hi);
    const float total_error = add(add(sum.hi, -add(total, -part)), add(product, -part));
    sum.hi = total;
    sum.lo = add(sum.lo, add(total_error, product_error));
  }
  __device__ static void add_product(Weight& sum, float a, Weight b) {
    add_product(sum, a, b.hi);
    sum.lo = fmaf(a, b.lo, sum.lo);
  }
  __device__ static void add_product(Weight& sum, Weight a, float b) { add_product(sum, b, a); }

  // Brings lo below the rounding of hi, so that what is added to it next is not lost in its own.
  __device__ static void settle(Weight& sum) {
    const float total = add(sum.hi, sum.lo), part = add(total, -sum.hi);
    sum.lo = add(add(sum.hi, -add(total, -part)), add(sum.lo, -part));
    sum.hi = total;
  }
  __device__ static void settle(Sum& d) {
    settle(d.x);
    settle(d.y);
  }

  __device__ static float shuffle(float x, int source) { return from_lane(x, source); }
  __device__ static Weight shuffle(Weight x, int source) {
    return {from_lane(x.hi, source), from_lane(x.lo, source)};
  }

  template <class A, class B>
  __device__ static void multiply_add(Sum& d, A a, B b) {
    const int g = lane() / 4, t = lane() % 4;
    EFLAT_ROLL  // 24 operations and 3 shuffles a round; unrolled, the operands fill the registers
        for (int k = 0; k < 4; ++k) {
      const A row = shuffle(a, 4 * g + k);
      add_product(d.x, row, shuffle(b, 8 * t + k));
      add_product(d.y, row, shuffle(b, 8 * t + 4 + k));
    }
  }
};

struct Native {};

template <class Math>
struct MathOf {
  using type = Math;
};
#if defined(__CUDA_ARCH__)
template <>
struct MathOf<Native> {
  static constexpr bool kStrong =
      __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000;
  using type = std::conditional_t<kStrong, Float64, TwoFloat>;
};
#endif

}  // namespace eflat::cuda
