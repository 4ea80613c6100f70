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

// partial[block] = Gram matrix of the block's rows of factor * basis, for the sides that need it.
__global__ void __launch_bounds__(kThreads) second_reduce_kernel(Tables t) {
  EFLAT_SHARED_DYNAMIC(double, shared);
  const BlockTask block = t.reduce_blocks[blockIdx.x];
  const SideTask& task = t.sides[block.owner];
  if (task.state->kind != Inversion::needs_second_pass) return;
  const int r = task.rank, rank = task.state->rank;
  const int chunk = kSharedBytes / int(sizeof(double)) / (2 * r);
  double* z = shared;
  double* y = shared + chunk * r;
  double* out = task.partial + int64_t(block.index) * rank * rank;
  for (int e = threadIdx.x; e < rank * rank; e += blockDim.x) out[e] = 0;
  for (int64_t k = block.begin; k < block.end; k += chunk) {
    const int count = int(block.end - k < chunk ? block.end - k : chunk);
    stage(task.side, task.dtype, r, r, k, count, z);
    __syncthreads();
    for (int e = threadIdx.x; e < count * rank; e += blockDim.x) {
      const int row = e / rank, p = e % rank;
      double sum = 0;
      for (int j = 0; j < r; ++j) sum += z[row * r + j] * task.basis[j * rank + p];
      y[e] = sum;
    }
    __syncthreads();
    add_gram(y, count, rank, out);
    __syncthreads();
  }
}

}  // namespace eflat::cuda
