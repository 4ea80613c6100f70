// The three stages as plainly as CUDA can say them, one pair at a time and one block a stage: a
// second witness for the tests of the fast kernels, which share only the r x r mathematics with it.
// Not part of the package.
#pragma once
#include "cuda.h"

namespace eflat::cuda::naive {

// Row k, column j of [factor | grad].
__device__ inline double at(const Side& side, DType dtype, int r, int64_t k, int j) {
  const int64_t column = j % r, i = side.transposed ? column * side.length + k : k * r + column;
  return j < r ? element(side.factor, side.added, dtype, i) : element(side.grad, dtype, i);
}

// gram (2r, 2r) = [factor | grad]^T [factor | grad]: a thread per entry.
__global__ void gram_kernel(Side side, DType dtype, int r, double* gram) {
  const int d = 2 * r;
  for (int e = threadIdx.x; e < d * d; e += blockDim.x) {
    double sum = 0;
    for (int64_t k = 0; k < side.length; ++k)
      sum += at(side, dtype, r, k, e / d) * at(side, dtype, r, k, e % d);
    gram[e] = sum;
  }
}

// The Gram matrix of [factor * T | grad * T_grad].
__global__ void second_gram_kernel(Side side, DType dtype, int r, const double* T,
                                   const double* T_grad, double* gram) {
  const int d = 2 * r;
  auto product = [&](int64_t k, int j) {
    const double* basis = (j < r ? T : T_grad) + j % r;
    double sum = 0;
    for (int i = 0; i < r; ++i) sum += at(side, dtype, r, k, j / r * r + i) * basis[i * r];
    return sum;
  };
  for (int e = threadIdx.x; e < d * d; e += blockDim.x) {
    double sum = 0;
    for (int64_t k = 0; k < side.length; ++k) sum += product(k, e / d) * product(k, e % d);
    gram[e] = sum;
  }
}

// r x r matrices of one pair.
struct Space {
  double *gram[2], *second[2], *inverse[2], *R[2], *T[2];  // target, other
  double* weights[2];
  double *M, *work;
  bool* again;  // of target, of other
  double *norm, *size, *scale;
};

__global__ void invert_kernel(Pair p, Space s) {
  const SerialTeam alone;
  for (int side = 0; side < 2; ++side) {
    for (int e = 0; e < p.rank * p.rank; ++e)
      s.M[e] = s.gram[side][e / p.rank * 2 * p.rank + e % p.rank];
    s.again[side] = invert_gram(alone, p.rank, s.M, p.rtol, p.dtype, s.inverse[side], s.R[side],
                                s.T[side], s.work);
    if (!s.again[side]) identity_bases(alone, p.rank, s.R[side], s.T[side]);
  }
}

__global__ void weights_kernel(Pair p, Space s, double rho, DType norms_dtype) {
  const SerialTeam alone;
  const bool again = s.again[0] || s.again[1];
  for (int side = 0; again && side < 2; ++side)
    correct_inverse(alone, p.rank, s.again[side], s.second[side], p.rtol, s.R[side],
                    s.inverse[side], s.work);
  double** gram = again ? s.second : s.gram;
  if (p.other.out) {
    *s.norm =
        tangent_norm_and_weights(alone, p.rank, gram[0], s.inverse[0], gram[1], s.inverse[1],
                                 again ? s.T[0] : nullptr, again ? s.T[1] : nullptr, p.scaling, rho,
                                 p.target.length, norms_dtype, s.weights[0], s.weights[1], s.work);
  } else {
    *s.norm = norm_and_weights(alone, p.rank, gram[0], s.inverse[0], gram[1], s.inverse[1],
                               p.scaling, norms_dtype, s.weights[0], s.work);
  }
  *s.size = 0;
  for (int side = 0; side < (p.other.out ? 2 : 1); ++side) {
    if (again) leave_bases(alone, p.rank, s.T[side], s.T[1 - side], s.weights[side], s.work);
    const double size = perturbation_size(alone, p.rank, s.gram[side], p.scaling, s.weights[side],
                                          *s.norm, rho, p.out_dtype);
    *s.size = *s.size > size ? *s.size : size;
  }
}

struct Layers {  // what finish_scales asks
  const Pair* pairs;
  const Space* spaces;
  double& norm(int l) { return *spaces[l].norm; }
  double& scale(int l) { return *spaces[l].scale; }
  double size(int l) const { return *spaces[l].size; }
  double scaling(int l) const { return pairs[l].scaling; }
  DType dtype(int l) const { return pairs[l].out_dtype; }
};

template <class T>
__device__ void store(void* out, int64_t i, double e, Update update) {
  T* p = static_cast<T*>(out) + i;
  *p = from_double<T>(update.average ? (1 - update.beta) * to_double(*p) + update.beta * e : e);
}

// E or its average, of the target or of the other side: a thread per row, since what is written may
// be what was added.
__global__ void apply_kernel(Pair p, Space s, Update update, bool of_other) {
  const Side& side = of_other ? p.other : p.target;
  const double* weights = s.weights[of_other];
  void* out = side.out;
  const bool use = usable(*s.norm);
  if (!use && update.average) return;
  const int r = p.rank;
  for (int64_t k = threadIdx.x; k < side.length; k += blockDim.x) {
    double row[2 * 256];
    for (int i = 0; i < 2 * r; ++i) row[i] = at(side, p.dtype, r, k, i);
    for (int j = 0; j < r; ++j) {
      double sum = 0;
      for (int i = 0; use && i < 2 * r; ++i) sum += row[i] * weights[i * r + j];
      const int64_t to = side.transposed ? j * side.length + k : k * r + j;
      const double x = use ? *s.scale * sum : 0.0;
      if (p.out_dtype == DType::f64) store<double>(out, to, x, update);
      if (p.out_dtype == DType::f32) store<float>(out, to, x, update);
      if (p.out_dtype == DType::bf16) store<bf16>(out, to, x, update);
      if (p.out_dtype == DType::f16) store<f16>(out, to, x, update);
    }
  }
}

}  // namespace eflat::cuda::naive
