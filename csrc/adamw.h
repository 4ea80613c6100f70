// torch.optim.AdamW of one element, in torch's order of operations; host and device.
#pragma once
#include <math.h>

#include "pairs.h"

namespace eflat {

EFLAT_HD float square_root(float x) { return sqrtf(x); }
EFLAT_HD double square_root(double x) { return sqrt(x); }

// What is the same for all elements of a factor. C: float for factors of up to 32 bits, else
// double.
template <class C>
struct AdamWNumbers {
  C keep;  // 1 - lr weight_decay
  C beta2, rest1, rest2;
  C root;  // of 1 - beta2^step
  C eps, step_size;
  bool from_gradient;  // beta1 is small: which end torch's lerp starts from
};

template <class C>
EFLAT_HD AdamWNumbers<C> adamw_numbers(const AdamW& a, double step_number) {
  const double rest1 = 1 - a.beta1;
  return {C(1 - a.lr * a.weight_decay),
          C(a.beta2),
          C(rest1),
          C(1 - a.beta2),
          C(sqrt(1 - pow(a.beta2, step_number))),
          C(a.eps),
          C(a.lr / (1 - pow(a.beta1, step_number))),
          !(rest1 < 0.5)};
}

template <class C>
EFLAT_HD void adamw(C& x, C grad, C& exp_avg, C& exp_avg_sq, const AdamWNumbers<C>& a) {
  const C difference = grad - exp_avg;
  exp_avg = a.from_gradient ? grad - difference * (1 - a.rest1) : exp_avg + a.rest1 * difference;
  exp_avg_sq = exp_avg_sq * a.beta2 + a.rest2 * grad * grad;
  const C denominator = square_root(exp_avg_sq) / a.root + a.eps;
  x = x * a.keep - a.step_size * exp_avg / denominator;
}

}  // namespace eflat
