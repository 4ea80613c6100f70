// torch.optim.AdamW of one element, in torch's order of operations; host and device.
//
// Torch rounds a product that is an operation of its own before it adds to it: the two of `decay`.
// Products that are added to something in the same operation are fused multiply-adds where the
// compiler has them, there as here.
//
// On the CPU, moments of float64 and float32 are torch's to the last bit, foreach or not, where
// both libraries run on the same instruction set or on two that have fused multiply-adds. So are
// the factors but for torch's square root, MKL's, which is a unit in the last place off for some
// numbers: of a step that is a few such units, before the sum is rounded. On a GPU nvcc may
// fuse the products of `decay` too, and torch's kernels multiply by a scalar's reciprocal where
// those of the CPU divide: no equal bits are promised. 16-bit factors are computed in float32 and
// rounded once, torch's after every operation.
#pragma once
#include <math.h>

#include "pairs.h"

namespace eflat {

EFLAT_HD float square_root(float x) { return sqrtf(x); }
EFLAT_HD double square_root(double x) { return sqrt(x); }

// Numbers that all elements of a factor share. C: float for factors of up to 32 bits, else
// double.
template <class C>
struct AdamWNumbers {
  C keep;  // 1 - lr weight_decay
  C beta2, rest1, rest2;
  C root;  // of 1 - beta2^step
  C eps, step_size;
  bool from_gradient;  // rest1 >= 0.5: which end torch's lerp starts from
};

template <class C>
EFLAT_HD AdamWNumbers<C> adamw_numbers(const AdamW& a, double step_number) {
  const C rest1 = C(1 - a.beta1);
  return {C(1 - a.lr * a.weight_decay),
          C(a.beta2),
          rest1,
          C(1 - a.beta2),
          C(pow(1 - pow(a.beta2, step_number), 0.5)),
          C(a.eps),
          C(a.lr / (1 - pow(a.beta1, step_number))),
          !(rest1 < C(0.5))};
}

template <class C>
EFLAT_HD void decay(C& x, C& exp_avg_sq, const AdamWNumbers<C>& a) {
  x *= a.keep;
  exp_avg_sq *= a.beta2;
}

// The step of one element, after its decay.
template <class C>
EFLAT_HD void adamw(C& x, C grad, C& exp_avg, C& exp_avg_sq, const AdamWNumbers<C>& a) {
  const C difference = grad - exp_avg;
  exp_avg = a.from_gradient ? grad - difference * (1 - a.rest1) : exp_avg + a.rest1 * difference;
  exp_avg_sq = exp_avg_sq + a.rest2 * grad * grad;
  const C denominator = square_root(exp_avg_sq) / a.root + a.eps;
  x = x - a.step_size * exp_avg / denominator;
}

}  // namespace eflat
