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

// A LoRA pair and what is to be done with its perturbation E, which has the target's shape.
struct Pair {
  Side target;  // the factor that E is for
  Side other;
  int rank;
  DType dtype;  // of factors and gradients
  double scaling;
  double rtol;
  void* out;  // E, or the moving average of it
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
