// torch.optim.AdamW of elements, in its order of operations: in float32, or in float64 for float64.
#pragma once
#include "call.h"
#include "cuda.h"

namespace eflat::cuda {

// What one step of one factor multiplies by. Made by one thread: powers in float64 are slow.
struct AdamWConstants {
  double decay, of_gradient, beta2, of_square, size, root, eps;

  __device__ void set(const Hyper& hyper, const float* step) {
    const double number = step ? double(*step) : hyper.step_number;
    decay = 1 - hyper.lr * hyper.weight_decay;
    of_gradient = 1 - hyper.beta1;
    beta2 = hyper.beta2;
    of_square = 1 - hyper.beta2;
    size = hyper.lr / (1 - pow(hyper.beta1, number));
    root = sqrt(1 - pow(hyper.beta2, number));
    eps = hyper.eps;
  }
};

template <class T>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

// The new value of element i, which was `value`; its moments are updated.
template <class T>
__device__ T adamw(const AdamWConstants& c, const AdamWArgs& args, int64_t i, T value, T gradient) {
  using Real = typename RealOf<T>::type;
  T& exp_avg = static_cast<T*>(args.exp_avg)[i];
  T& exp_avg_sq = static_cast<T*>(args.exp_avg_sq)[i];
  const Real g = Real(to_double(gradient)), old = Real(to_double(exp_avg));
  const Real m = old + Real(c.of_gradient) * (g - old);
  const Real v = Real(c.beta2) * Real(to_double(exp_avg_sq)) + Real(c.of_square) * g * g;
  exp_avg = from_double<T>(m);
  exp_avg_sq = from_double<T>(v);
  const Real change = Real(c.size) * m / (sqrt(v) / Real(c.root) + Real(c.eps));
  return from_double<T>(Real(c.decay) * Real(to_double(value)) - change);
}

// Element i of a factor: the step from its value in `from` (the clean values of a target).
__device__ inline void step_element(const SideArgs& side, const void* from, const AdamWArgs& args,
                                    const AdamWConstants& c, int64_t i) {
  auto step = [&](auto type) {
    using T = decltype(type);
    T* factor = static_cast<T*>(const_cast<void*>(side.factor));
    factor[i] =
        adamw<T>(c, args, i, static_cast<const T*>(from)[i], static_cast<const T*>(side.grad)[i]);
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
