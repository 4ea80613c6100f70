// torch.optim.AdamW of a factor's elements.
#pragma once
#include <type_traits>

#include "../core/adamw.h"
#include "call.h"
#include "cuda.h"

namespace eflat::cuda {

// Numbers of one factor's step, made by one thread: powers in float64 are slow.
struct FactorNumbers {
  AdamWNumbers<float> of_float;
  AdamWNumbers<double> of_double;

  __device__ void set(const Hyper& hyper, const float* step) {
    AdamW a{};
    a.lr = hyper.lr;
    a.beta1 = hyper.beta1;
    a.beta2 = hyper.beta2;
    a.eps = hyper.eps;
    a.weight_decay = hyper.weight_decay;
    const double number = step ? double(*step) : hyper.step_number;
    of_float = adamw_numbers<float>(a, number);
    of_double = adamw_numbers<double>(a, number);
  }
  __device__ const AdamWNumbers<float>& operator()(float) const { return of_float; }
  __device__ const AdamWNumbers<double>& operator()(double) const { return of_double; }
};

// float, or double for double: what a type's step is computed in.
template <class T>
using StepType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T x[4];
};

// The elements i to i + kCount of a factor.
template <class T, int kCount>
__device__ void step_elements(const SideArgs& side, const AdamWArgs& args,
                              const FactorNumbers& numbers, int64_t i) {
  using C = StepType<T>;
  using Some = std::conditional_t<kCount == 4, Four<T>, T>;
  auto at = [i](const void* x) {
    return reinterpret_cast<Some*>(static_cast<T*>(const_cast<void*>(x)) + i);
  };
  Some value = *at(side.factor), m = *at(args.exp_avg), v = *at(args.exp_avg_sq);
  const Some grad = *at(side.grad);
  EFLAT_UNROLL
  for (int n = 0; n < kCount; ++n) {
    C x = C(to_double(reinterpret_cast<T*>(&value)[n]));
    C exp_avg = C(to_double(reinterpret_cast<T*>(&m)[n]));
    C exp_avg_sq = C(to_double(reinterpret_cast<T*>(&v)[n]));
    decay(x, exp_avg_sq, numbers(C()));
    adamw(x, C(to_double(reinterpret_cast<const T*>(&grad)[n])), exp_avg, exp_avg_sq, numbers(C()));
    reinterpret_cast<T*>(&value)[n] = from_double<T>(x);
    reinterpret_cast<T*>(&m)[n] = from_double<T>(exp_avg);
    reinterpret_cast<T*>(&v)[n] = from_double<T>(exp_avg_sq);
  }
  *at(side.factor) = value;
  *at(args.exp_avg) = m;
  *at(args.exp_avg_sq) = v;
}

template <class T>
__device__ void step_rows(const SideArgs& side, const AdamWArgs& args, const FactorNumbers& numbers,
                          int r, int64_t begin, int64_t end) {
  // Runs of neighbours in memory: one, or one for each row of a transposed side.
  const int rows = int(end - begin), run = side.transposed ? rows : rows * r;
  const int runs = side.transposed ? r : 1, each = args.fours ? 4 : 1;
  EFLAT_ROLL
  for (int e = threadIdx.x * each; e < runs * run; e += kThreads * each) {
    const int64_t i =
        side.transposed ? e / run * int64_t(side.length) + begin + e % run : begin * r + e;
    if (args.fours) {
      step_elements<T, 4>(side, args, numbers, i);
    } else {
      step_elements<T, 1>(side, args, numbers, i);
    }
  }
}

// Rows [begin, end) of a factor.
EFLAT_NOINLINE void step_rows(const SideArgs& side, const AdamWArgs& args,
                              const FactorNumbers& numbers, int r, int64_t begin, int64_t end) {
  switch (side.dtype) {
    case DType::f64:
      return step_rows<double>(side, args, numbers, r, begin, end);
    case DType::f32:
      return step_rows<float>(side, args, numbers, r, begin, end);
    case DType::bf16:
      return step_rows<bf16>(side, args, numbers, r, begin, end);
    default:
      return step_rows<f16>(side, args, numbers, r, begin, end);
  }
}

}  // namespace eflat::cuda
