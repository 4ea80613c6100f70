// What the kernels are given: plain pointers and sizes, no tensors.
#pragma once
#include <stdint.h>

#include "dtypes.h"

namespace eflat {

constexpr int kMaxRank = 256;

// A factor and its gradient, seen as length x r matrices with a row per output (B) or input (A)
// of the layer. B (n, r) is stored so; A (r, m) is stored transposed.
struct Side {
  const void* factor;
  const void* grad;  // null: factor alone
  int64_t length;
  bool transposed;
};

// torch.optim.AdamW of one factor; hyperparameters of its own, since parameter groups may differ.
struct AdamW {
  void* factor;  // written: the factor of the pair's side
  void* exp_avg;
  void* exp_avg_sq;    // both of the factor's type
  float* step;         // steps before this one, where the kernels can read it and raise it by one;
  double step_number;  // null: this is the number of this step, from 1
  double lr, beta1, beta2, eps, weight_decay;
};

// The optimizer's step of a pair, after its perturbation has gone into the moving average: what was
// perturbed returns to its clean values, then AdamW of both factors.
struct Step {
  const void* clean;        // like the target, perhaps the target itself
  const void* clean_other;  // of the other factor, likewise; it is the factor where no E is for it
  AdamW target, other;
};

// A LoRA pair and what is to be done with its perturbation E, which has the target's shape.
struct Pair {
  Side target;  // the factor that E is for
  Side other;
  int rank;
  DType dtype;  // of factors and gradients
  double scaling;
  double rtol;
  void* out;        // E, or the moving average of it
  void* out_other;  // null; or both factors are perturbed: the target is B, and this is for A
  DType out_dtype;
  const Step* step;  // null: the perturbation alone
};

// out = E, or out = (1 - beta) out + beta E where E is usable.
struct Update {
  bool average;
  double beta;
};

struct Problem {
  const Pair* pairs;
  int count;
  double rho;
  bool global_norm;
  Update update;
  DType norms_dtype;  // norms are reported in: float64 or float32
};

}  // namespace eflat
