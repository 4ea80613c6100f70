// The input of the kernels: plain pointers and sizes, no tensors.
#pragma once
#include <stdint.h>

#include "dtypes.h"

namespace eflat {

// torch.optim.AdamW of one factor; hyperparameters of its own, since parameter groups may differ.
struct AdamW {
  void* factor;  // of the side, to be written
  void* exp_avg;
  void* exp_avg_sq;    // both of the factor's type
  float* step;         // steps before this one, where the kernels can read it and raise it by one;
  double step_number;  // null: this is the number of this step, from 1
  double lr, beta1, beta2, eps, weight_decay;
};

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
  void* out = nullptr;          // for E or its moving average, which may be `added`; null: no E
  const AdamW* step = nullptr;  // the optimizer's, once E is there; null: none
};

// A LoRA pair. The target is perturbed: A or B. The other side is perturbed too where it has an
// `out`; the target is B then.
struct Pair {
  Side target;
  Side other;
  int rank;
  DType dtype;  // of factors and gradients
  double scaling;
  double rtol;
  DType out_dtype;
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
