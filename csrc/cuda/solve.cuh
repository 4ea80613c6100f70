// Stage 2: pseudo-inverses, norms and coefficients, one warp per matrix, in device memory.
//
// Bytes and flops are those of a few r x r products per pair: nothing beside the other stages. The
// latency of one warp bounds it.
#pragma once
#include "reduce.cuh"

namespace eflat::cuda {

// gram = sum of the partial ones, in order.
__device__ inline void sum_partials(const SideTask& task, int size, double* gram) {
  for (int e = WarpTeam::lane(); e < size; e += WarpTeam::lanes()) {
    double sum = 0;
    for (int b = 0; b < task.blocks; ++b) sum += task.partial[int64_t(b) * size + e];
    gram[e] = sum;
  }
  WarpTeam::sync();
}

// M^+ of each side, and the bases of a second pass.
__global__ void __launch_bounds__(32) invert_kernel(Tables t) {
  const SideTask& task = t.sides[blockIdx.x];
  const int r = task.rank;
  sum_partials(task, 4 * r * r, task.gram);
  double* M = task.second;  // free until the second pass
  for (int e = WarpTeam::lane(); e < r * r; e += WarpTeam::lanes())
    M[e] = task.gram[e / r * 2 * r + e % r];
  WarpTeam::sync();
  const bool again = invert_gram(WarpTeam(), r, M, task.rtol, task.dtype, task.inverse, task.R,
                                 task.T, task.eigenvalues, task.work);
  if (WarpTeam::lane() == 0) *task.again = again;
}

// After second_reduce_kernel.
__global__ void __launch_bounds__(32) correct_kernel(Tables t) {
  const SideTask& task = t.sides[blockIdx.x];
  if (!pair_again(t, task)) return;
  const int r = task.rank;
  sum_partials(task, 4 * r * r, task.second);
  correct_inverse(WarpTeam(), r, *task.again, task.second, task.rtol, task.R, task.inverse,
                  task.work);
}

__global__ void __launch_bounds__(32) weights_kernel(Tables t, double rho, DType norms_dtype) {
  const int l = blockIdx.x;
  const PairTask& pair = t.pairs[l];
  const SideTask &target = t.sides[pair.target], &other = t.sides[pair.other];
  const int r = target.rank;
  const bool again = pair_again(t, target);
  const double norm =
      norm_and_weights(WarpTeam(), r, again ? target.second : target.gram, target.inverse,
                       again ? other.second : other.gram, other.inverse, pair.scaling, norms_dtype,
                       pair.weights, pair.work);
  if (again) leave_bases(WarpTeam(), r, target.T, other.T, pair.weights, pair.work);
  const double size = perturbation_size(WarpTeam(), r, target.gram, pair.scaling, pair.weights,
                                        norm, rho, pair.out_dtype);
  if (WarpTeam::lane() == 0) {
    t.norms[l] = norm;
    t.sizes[l] = size;
  }
}

struct TableLayers {  // what finish_scales asks
  Tables t;
  __device__ double& norm(int l) { return t.norms[l]; }
  __device__ double& scale(int l) { return t.scales[l]; }
  __device__ double size(int l) const { return t.sizes[l]; }
  __device__ double scaling(int l) const { return t.pairs[l].scaling; }
  __device__ DType dtype(int l) const { return t.pairs[l].out_dtype; }
};

// values[l] = x, values of float64 or float32.
__device__ inline void report(void* values, DType dtype, int l, double x) {
  if (dtype == DType::f64) {
    static_cast<double*>(values)[l] = x;
  } else {
    static_cast<float*>(values)[l] = float(x);
  }
}

// One thread: a few flops per layer, in a fixed order.
__global__ void scales_kernel(Tables t, double rho, bool global_norm, void* norms,
                              DType norms_dtype, int64_t* skipped) {
  TableLayers layers{t};
  finish_scales(layers, t.pair_count, rho, global_norm);
  for (int l = 0; l < t.pair_count; ++l) {
    report(norms, norms_dtype, l, t.norms[l]);
    if (skipped && !usable(t.norms[l])) ++*skipped;
  }
}

// t.norms = |s| ||B E_A||, from ||B E_A||^2 = tr(B^T B E_A E_A^T).
__global__ void __launch_bounds__(32) applied_norm_kernel(Tables t) {
  const PairTask& pair = t.pairs[blockIdx.x];
  const SideTask &target = t.sides[pair.target], &other = t.sides[pair.other];
  const int size = target.rank * target.rank;
  sum_partials(target, size, target.gram);
  sum_partials(other, size, other.gram);
  const double square = dot(WarpTeam(), size, target.gram, other.gram);
  if (WarpTeam::lane() == 0)
    t.norms[blockIdx.x] = fabs(pair.scaling) * sqrt(square > 0 ? square : 0.0);
}

// factors = min(1, rho / norm), by layer or for all.
__global__ void bound_kernel(Tables t, double rho, bool global_norm, void* factors, DType dtype) {
  double squares = 0;
  for (int l = 0; l < t.pair_count; ++l) squares += t.norms[l] * t.norms[l];
  for (int l = 0; l < t.pair_count; ++l) {
    const double norm = global_norm ? sqrt(squares) : t.norms[l];
    report(factors, dtype, l, norm > rho ? rho / norm : 1.0);
  }
}

}  // namespace eflat::cuda
