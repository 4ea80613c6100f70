// The parts of CUDA that kernels use, so that the same sources compile for the host, too: there
// EFLAT_HOST_CUDA names a header that runs CUDA threads on the CPU. Hence dynamic shared memory
// and launches through macros, and a plain twin beside each piece of code that only a GPU has.
#pragma once
#if defined(EFLAT_HOST_CUDA)
#include EFLAT_HOST_CUDA
#define EFLAT_GRID_CONSTANT(T) const T&
#define EFLAT_NOINLINE inline
#define EFLAT_UNROLL
#define EFLAT_ROLL
#else
#include <cuda_runtime.h>
#define EFLAT_SHARED_DYNAMIC(T, name)                                  \
  extern __shared__ __align__(16) unsigned char eflat_shared_memory[]; \
  T* name = reinterpret_cast<T*>(eflat_shared_memory)
#define EFLAT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define EFLAT_GRID_CONSTANT(T) const __grid_constant__ T
#define EFLAT_NOINLINE __device__ __noinline__
#define EFLAT_UNROLL _Pragma("unroll")
#define EFLAT_ROLL _Pragma("unroll 1")
#endif

#define EFLAT_TARGET cuda_device
#include "../core/coefficients.h"

namespace eflat::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;

__device__ inline int lane() { return int(threadIdx.x) % 32; }
__device__ inline int warp() { return int(threadIdx.x) / 32; }

// A flag that other blocks set. What they wrote before is visible after a fence.
__device__ inline int read_flag(const int* flag) {
#if defined(EFLAT_HOST_CUDA)
  return host_cuda::load_acquire(flag);
#else
  return *static_cast<const volatile int*>(flag);
#endif
}

// Makes the compiler compute from x anew in each round of a loop: kept, it would take registers.
__device__ inline void recompute_from([[maybe_unused]] int& x) {
#if !defined(EFLAT_HOST_CUDA)
  asm volatile("" : "+r"(x));
#endif
}

// Keeps the compiler from starting the next part before this one: both would take registers.
__device__ inline void one_by_one() {
#if !defined(EFLAT_HOST_CUDA)
  asm volatile("" ::: "memory");
#endif
}

// On its way to the L2 cache.
__device__ inline void prefetch([[maybe_unused]] const void* p) {
#if !defined(EFLAT_HOST_CUDA)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Not to be kept in the L1 cache: read once.
template <class T>
__device__ T read_once(const T* p) {
#if defined(EFLAT_HOST_CUDA)
  return *p;
#else
  return __ldcg(p);
#endif
}

struct Sum {
  __device__ double operator()(double x, double y) const { return x + y; }
};
struct Largest {
  __device__ double operator()(double x, double y) const { return x > y ? x : y; }
};

// Over the lanes of a warp, bit-equal in all of them.
template <class Combine>
__device__ double warp_combine(double x, Combine combine) {
#if defined(EFLAT_HOST_CUDA)
  double all[32];  // the same butterfly, at the price of one exchange
  host_cuda::warp_exchange(x, all);
  for (int offset = 16; offset > 0; offset /= 2)
    for (int i = 0; i < offset; ++i) all[i] = combine(all[i], all[i + offset]);
  return all[0];
#else
  for (int offset = 16; offset > 0; offset /= 2)
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
#endif
}

// A thread block, for the r x r mathematics of small_matrix.h: a warp per row.
struct BlockTeam {
  double* scratch;  // in shared memory, one per warp
  __device__ static int lane() { return cuda::lane(); }
  __device__ static constexpr int lanes() { return 32; }
  __device__ static int row() { return warp(); }
  __device__ static constexpr int rows() { return kWarps; }
  __device__ static void sync() { __syncthreads(); }
  __device__ static double sum(double x) { return warp_combine(x, Sum()); }
  __device__ double total(double x) const { return combine(x, Sum()); }
  __device__ double largest(double x) const { return combine(x, Largest()); }

 private:
  template <class Combine>
  __device__ double combine(double x, Combine combine) const {
    x = warp_combine(x, combine);
    if (lane() == 0) scratch[row()] = x;
    __syncthreads();
    double all = scratch[0];
    for (int w = 1; w < kWarps; ++w) all = combine(all, scratch[w]);
    __syncthreads();
    return all;
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

// An element of a side's point, see pairs.h.
template <class T>
__device__ double element(const void* factor, const void* added, int64_t i) {
  const auto e = static_cast<const typename AddedTo<T>::type*>(added)[i];
  return to_double(point(static_cast<const T*>(factor)[i], e));
}

__device__ inline double element(const void* factor, const void* added, DType dtype, int64_t i) {
  if (!added) return element(factor, dtype, i);
  switch (dtype) {
    case DType::f64:
      return element<double>(factor, added, i);
    case DType::f32:
      return element<float>(factor, added, i);
    case DType::bf16:
      return element<bf16>(factor, added, i);
    default:
      return element<f16>(factor, added, i);
  }
}

}  // namespace eflat::cuda
