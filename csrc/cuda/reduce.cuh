// Stage 1: Gram matrices. The plain version: obviously right, one pass over the inputs.
//
// Bytes: each factor and gradient once, (n + m) 2r elements; flops: (n + m) (2r)^2 multiply-adds in
// float64 (both halves of the symmetric matrix). Block: 256 threads, 32 KiB of shared memory for a
// chunk of rows; each thread owns entries of the Gram matrix and sums them over the chunk.
#pragma once
#include "cuda.h"

namespace eflat::cuda {

// out (n, n) += z^T z for z (count, n) in shared memory.
__device__ inline void add_gram(const double* z, int count, int n, double* out) {
  for (int e = threadIdx.x; e < n * n; e += blockDim.x) {
    const int i = e / n, j = e % n;
    double sum = 0;
    for (int k = 0; k < count; ++k) sum += z[k * n + i] * z[k * n + j];
    out[e] += sum;
  }
}

// partial[block] = Gram matrix of the block's rows of [factor | grad].
__global__ void __launch_bounds__(kThreads) reduce_kernel(Tables t) {
  EFLAT_SHARED_DYNAMIC(double, z);
  const BlockTask block = t.reduce_blocks[blockIdx.x];
  const SideTask& task = t.sides[block.owner];
  const int width = task.side.grad ? 2 * task.rank : task.rank;
  const int chunk = kSharedBytes / int(sizeof(double)) / width;
  double* out = task.partial + int64_t(block.index) * width * width;
  for (int e = threadIdx.x; e < width * width; e += blockDim.x) out[e] = 0;
  for (int64_t k = block.begin; k < block.end; k += chunk) {
    const int count = int(block.end - k < chunk ? block.end - k : chunk);
    stage(task.side, task.dtype, task.rank, width, k, count, z);
    __syncthreads();
    add_gram(z, count, width, out);
    __syncthreads();
  }
}

__device__ inline bool pair_again(const Tables& t, const SideTask& task) {
  return *task.again || *t.sides[task.partner].again;
}

// partial[block] = Gram matrix of the block's rows of [factor * T | grad * T of the partner], for
// the pairs that need it.
__global__ void __launch_bounds__(kThreads) second_reduce_kernel(Tables t) {
  EFLAT_SHARED_DYNAMIC(double, shared);
  const BlockTask block = t.reduce_blocks[blockIdx.x];
  const SideTask& task = t.sides[block.owner];
  if (!pair_again(t, task)) return;
  const int r = task.rank, width = 2 * r;
  const int chunk = kSharedBytes / int(sizeof(double)) / (2 * width);
  double* z = shared;
  double* y = shared + chunk * width;
  const double* T = task.T;
  const double* T_grad = t.sides[task.partner].T;
  double* out = task.partial + int64_t(block.index) * width * width;
  for (int e = threadIdx.x; e < width * width; e += blockDim.x) out[e] = 0;
  for (int64_t k = block.begin; k < block.end; k += chunk) {
    const int count = int(block.end - k < chunk ? block.end - k : chunk);
    stage(task.side, task.dtype, r, width, k, count, z);
    __syncthreads();
    for (int e = threadIdx.x; e < count * width; e += blockDim.x) {
      const int column = e % width, half = column / r;
      const double* row = z + e / width * width + half * r;
      const double* basis = (half == 0 ? T : T_grad) + column % r;
      double sum = 0;
      for (int j = 0; j < r; ++j) sum += row[j] * basis[j * r];
      y[e] = sum;
    }
    __syncthreads();
    add_gram(y, count, width, out);
    __syncthreads();
  }
}

}  // namespace eflat::cuda
