// torch.optim.AdamW of a factor's elements.
#pragma once
#include <type_traits>

#include "../adamw.h"
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

// Element i of a factor: the step from its value in `from` (the clean values of a target).
__device__ inline void step_element(const SideArgs& side, const void* from, const AdamWArgs& args,
                                    const FactorNumbers& numbers, int64_t i) {
  auto step = [&](auto type) {
    using T = decltype(type);
    using C = StepType<T>;
    T& exp_avg = static_cast<T*>(args.exp_avg)[i];
    T& exp_avg_sq = static_cast<T*>(args.exp_avg_sq)[i];
    C x = C(to_double(static_cast<const T*>(from)[i])), m = C(to_double(exp_avg));
    C v = C(to_double(exp_avg_sq));
    adamw(x, C(to_double(static_cast<const T*>(side.grad)[i])), m, v, numbers(C()));
    exp_avg = from_double<T>(m);
    exp_avg_sq = from_double<T>(v);
    static_cast<T*>(const_cast<void*>(side.factor))[i] = from_double<T>(x);
  };
  switch (side.dtype) {
    case DType::f64:
      return step(double{});
    case DType::f32:
      return step(float{});
    case DType::bf16:
      return step(bf16{});
    default:
      return step(f16{});
  }
}

// Calls body(i) for the elements of rows [begin, end) of a side.
template <class Body>
__device__ void for_elements(const SideArgs& side, int r, int64_t begin, int64_t end, Body body) {
  const int rows = int(end - begin);
  EFLAT_ROLL
  for (int e = threadIdx.x; e < rows * r; e += kThreads)
    body(side.transposed ? e / rows * int64_t(side.length) + begin + e % rows : begin * r + e);
}

}  // namespace eflat::cuda
