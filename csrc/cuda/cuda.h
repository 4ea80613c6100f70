// What the kernels need of CUDA, so that the same sources can be compiled for the host, too: there
// EFLAT_HOST_CUDA names a header that runs CUDA threads on the CPU. Hence dynamic shared memory
// and launches through macros.
#pragma once
#if defined(EFLAT_HOST_CUDA)
#include EFLAT_HOST_CUDA
#else
#include <cuda_runtime.h>
#define EFLAT_SHARED_DYNAMIC(T, name)                                  \
  extern __shared__ __align__(16) unsigned char eflat_shared_memory[]; \
  T* name = reinterpret_cast<T*>(eflat_shared_memory)
#define EFLAT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

#define EFLAT_TARGET cuda_device
#include "../coefficients.h"
#include "tasks.h"

namespace eflat::cuda {

// One warp, for the r x r mathematics of small_matrix.h.
struct WarpTeam {
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static constexpr int lanes() { return 32; }
  __device__ static void sync() { __syncwarp(); }
  __device__ static double sum(double x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  }
};

template <class T>
__device__ double element(const void* x, int64_t i) {
  return to_double(static_cast<const T*>(x)[i]);
}

__device__ inline double element(const void* x, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return element<double>(x, i);
    case DType::f32:
      return element<float>(x, i);
    case DType::bf16:
      return element<bf16>(x, i);
    default:
      return element<f16>(x, i);
  }
}

// z[k * width + j]: rows begin ... begin + count of [factor | grad], or of factor alone, in
// float64. Neighbouring threads read neighbouring addresses.
__device__ inline void stage(const Side& side, DType dtype, int r, int width, int64_t begin,
                             int count, double* z) {
  for (int matrix = 0; matrix * r < width; ++matrix) {
    const void* x = matrix == 0 ? side.factor : side.grad;
    for (int e = threadIdx.x; e < count * r; e += blockDim.x) {
      const int k = side.transposed ? e % count : e / r;
      const int j = side.transposed ? e / count : e % r;
      const int64_t source = side.transposed ? j * side.length + begin + k : (begin + k) * r + j;
      z[k * width + matrix * r + j] = element(x, dtype, source);
    }
  }
}

}  // namespace eflat::cuda
