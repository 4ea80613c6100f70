// What the kernels are given: plain pointers and sizes, no tensors.
#pragma once
#include <stdint.h>

#include "dtypes.h"

namespace eflat {

constexpr int kMaxRank = 256;

// A factor and its gradient, seen as length x r matrices with a row per output (B) or input (A)
// of the layer. B (n, r) is stored so; A (r, m) is stored transposed.
//
// The gradient was taken at the factor or, where the forward pass has added something to it, at
// their sum in the type of what was added, rounded to the factor's type: the side's point, which
// Gram matrices and products are of.
struct Side {
  const void* factor;
  const void* grad;  // null: factor alone
  int64_t length;
  bool transposed;
  const void* added = nullptr;  // float64 for a float64 factor, else float32; null: nothing
};

// torch.optim.AdamW of one factor; hyperparameters of its own, since parameter groups may differ.
struct AdamW {
  void* factor;  // of the pair's side, to be written
  void* exp_avg;
  void* exp_avg_sq;    // both of the factor's type
  float* step;         // steps before this one, where the kernels can read it and raise it by one;
  double step_number;  // null: this is the number of this step, from 1
  double lr, beta1, beta2, eps, weight_decay;
};

// The optimizer's step of a pair, after its perturbation has gone into the moving average.
struct Step {
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
  void* out;        // E, or the moving average of it, which may be what was added to the target
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
