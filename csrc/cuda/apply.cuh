// Stage 3: E = scale * [factor | grad] * weights, or its moving average.
//
// Bytes: the target's factor and gradient once, E once (its average twice); flops: length * 2r * r
// multiply-adds in float64. Block: 256 threads, 32 KiB of shared memory for a chunk of rows; each
// thread computes entries of E.
#pragma once
#include "cuda.h"

namespace eflat::cuda {

template <class T>
__device__ void store(void* out, int64_t i, double e, Update update) {
  T* p = static_cast<T*>(out) + i;
  *p = from_double<T>(update.average ? (1 - update.beta) * to_double(*p) + update.beta * e : e);
}

__device__ inline void store(void* out, DType dtype, int64_t i, double e, Update update) {
  switch (dtype) {
    case DType::f64:
      return store<double>(out, i, e, update);
    case DType::f32:
      return store<float>(out, i, e, update);
    case DType::bf16:
      return store<bf16>(out, i, e, update);
    default:
      return store<f16>(out, i, e, update);
  }
}

__global__ void __launch_bounds__(kThreads) apply_kernel(Tables t, Update update) {
  EFLAT_SHARED_DYNAMIC(double, z);
  const BlockTask block = t.apply_blocks[blockIdx.x];
  const PairTask& pair = t.pairs[block.owner];
  const SideTask& task = t.sides[pair.target];
  const Side& side = task.side;
  const int r = task.rank, width = 2 * r;
  const bool use = usable(t.norms[block.owner]);
  if (!use && update.average) return;
  const double scale = t.scales[block.owner];
  const int chunk = kSharedBytes / int(sizeof(double)) / width;
  for (int64_t k = block.begin; k < block.end; k += chunk) {
    const int count = int(block.end - k < chunk ? block.end - k : chunk);
    if (use) stage(side, task.dtype, r, width, k, count, z);
    __syncthreads();
    for (int e = threadIdx.x; e < count * r; e += blockDim.x) {
      const int row = side.transposed ? e % count : e / r;
      const int j = side.transposed ? e / count : e % r;
      double sum = 0;
      for (int i = 0; use && i < width; ++i) sum += z[row * width + i] * pair.weights[i * r + j];
      const int64_t at = side.transposed ? j * side.length + k + row : (k + row) * r + j;
      store(pair.out, pair.out_dtype, at, use ? scale * sum : 0.0, update);
    }
    __syncthreads();
  }
}

}  // namespace eflat::cuda
