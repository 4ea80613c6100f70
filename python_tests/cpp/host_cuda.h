// Runs CUDA kernels on the CPU, for tests: each CUDA thread is a fiber, switched where it waits.
//
// The threads of a block take turns, each running until it waits, so that a missing barrier gives
// wrong numbers for the thread that runs early; ThreadSanitizer reports the missing barriers that
// give right numbers by luck. Shared memory is filled with NaN before each block and allocated to
// the byte, so that AddressSanitizer sees an overrun. The program ends with a message where CUDA
// would hang or be undefined: a barrier that some live thread never reaches, or reached from
// different places; a thread that sleeps for something that never happens; a launch beyond limits.
//
// Blocks run one after another, in order. With EFLAT_HOST_CUDA_BLOCKS=N, N of them are resident
// and take turns in an order drawn from EFLAT_HOST_CUDA_SEED, at barriers, atomics, fences and
// __nanosleep, which a loop that waits for another block must call. ThreadSanitizer knows
// no order between resident blocks but that of atomics; each block is ordered before the one that
// takes its place. With EFLAT_HOST_CUDA_STRICT_FENCES=1 atomics are relaxed, so that it reports a
// missing __threadfence before or after one; else they acquire and release.
//
// EFLAT_HOST_CUDA_LIST_BARRIERS=1 lists the barriers and fences that a program has passed when it
// exits, EFLAT_HOST_CUDA_DROP_BARRIER=NAME leaves one out: see drop_barriers.py.
//
// Differences from CUDA: one-dimensional grids and blocks; full masks only; shared memory by the
// macros below; inline PTX needs a plain twin, where WarpValues, warp_exchange,
// load_acquire and store_release help.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EFLAT_VECTOR_2(T, name, bytes) \
  struct alignas(bytes) name {         \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) { return {x, y}; }
#define EFLAT_VECTOR_4(T, name, bytes) \
  struct alignas(bytes) name {         \
    T x, y, z, w;                      \
  };                                   \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EFLAT_VECTOR_2(int, int2, 8)
EFLAT_VECTOR_2(unsigned, uint2, 8)
EFLAT_VECTOR_2(float, float2, 8)
EFLAT_VECTOR_2(double, double2, 16)
EFLAT_VECTOR_4(int, int4, 16)
EFLAT_VECTOR_4(unsigned, uint4, 16)
EFLAT_VECTOR_4(float, float4, 16)
#undef EFLAT_VECTOR_2
#undef EFLAT_VECTOR_4

namespace host_cuda {

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The number of resident blocks, and the seed of the order in which they advance. One block: in
// order, whatever the seed.
void set_schedule(int resident_blocks, unsigned seed);

// True: atomics are relaxed, as CUDA's. False: they acquire and release.
void set_strict_fences(bool strict);

constexpr int kMaxThreads = 1024;
constexpr size_t kSharedBytes = 48 << 10;         // of a block, if nothing else is asked for
constexpr size_t kSharedBytesOptin = 99 << 10;    // cudaDevAttrMaxSharedMemoryPerBlockOptin
constexpr size_t kSharedBytesReserved = 1 << 10;  // of each block, by the system

struct Place {
  uint3 thread, block;
  dim3 size, grid;
  unsigned lane() const { return thread.x % 32; }
};
extern const Place* here;  // of the thread that runs

void launch(dim3 grid, dim3 size, size_t shared_bytes, const void* kernel,
            const std::function<void()>& body);
void allow_shared_bytes(const void* kernel, size_t bytes);

void sync_threads();
void sync_warp();
void sleep();      // lets others advance
void interrupt();  // lets others advance, perhaps
void fence();
void order_atomic(void* p);  // for the atomic operation on *p that follows at once
void* dynamic_shared();
void* static_shared(const void* declaration, size_t bytes, size_t alignment);

constexpr size_t kSlotBytes = 64;
using Slots = unsigned char[32][kSlotBytes];
// Deposits a value in this lane's slot and waits for the warp; gives what all have deposited. The
// slot of a lane without a live thread is filled with NaN.
const Slots& exchange(unsigned mask, const void* value, size_t bytes);

// The values that the lanes of the warp passed, valid until this thread's next exchange but one.
template <class T>
class WarpValues {
 public:
  explicit WarpValues(const T& mine, unsigned mask = 0xffffffffu)
      : slots_(exchange(mask, &mine, sizeof(T))) {
    static_assert(sizeof(T) <= kSlotBytes);
  }
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots_[lane], sizeof(T));
    return value;
  }

 private:
  const Slots& slots_;
};

// all[i] = what lane i passed as `mine`.
template <class T>
void warp_exchange(const T& mine, T (&all)[32]) {
  const WarpValues<T> values(mine);
  for (int i = 0; i < 32; ++i) all[i] = values[i];
}

template <class T>
T from_lane(unsigned mask, T value, int lane) {
  const WarpValues<T> values(value, mask);
  return lane < 0 || lane > 31 ? value : values[lane];
}

template <class T>
T load_acquire(const T* p) {
  interrupt();
  T value;
  __atomic_load(p, &value, __ATOMIC_ACQUIRE);
  return value;
}

template <class T>
void store_release(T* p, T value) {
  __atomic_store(p, &value, __ATOMIC_RELEASE);
  interrupt();
}

// *p = update(*p) in one step; what *p was.
template <class T, class Update>
T atomically(T* p, Update update) {
  interrupt();
  order_atomic(p);
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  do after = update(before);
  while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  interrupt();
  return before;
}

}  // namespace host_cuda

#define threadIdx (host_cuda::here->thread)
#define blockIdx (host_cuda::here->block)
#define blockDim (host_cuda::here->size)
#define gridDim (host_cuda::here->grid)
constexpr int warpSize = 32;

inline void __syncthreads() { host_cuda::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) host_cuda::fail("__syncwarp takes the full mask only");
  host_cuda::sync_warp();
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return host_cuda::from_lane(mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return host_cuda::from_lane(mask, value, int(host_cuda::here->lane()) ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  return host_cuda::from_lane(mask, value, int(host_cuda::here->lane() + lanes));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  return host_cuda::from_lane(mask, value, int(host_cuda::here->lane()) - int(lanes));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned char vote = predicate != 0;
  const host_cuda::WarpValues<unsigned char> all(vote, mask);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned(all[i] == 1) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

inline void __threadfence() { host_cuda::fence(); }
inline void __threadfence_block() { host_cuda::fence(); }
inline void __nanosleep(unsigned) { host_cuda::sleep(); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

#define EFLAT_ATOMICS(T)                                                            \
  inline T atomicAdd(T* p, T value) {                                               \
    return host_cuda::atomically(p, [=](T before) -> T { return before + value; }); \
  }                                                                                 \
  inline T atomicExch(T* p, T value) {                                              \
    return host_cuda::atomically(p, [=](T) { return value; });                      \
  }
EFLAT_ATOMICS(int)
EFLAT_ATOMICS(unsigned)
EFLAT_ATOMICS(unsigned long long)
EFLAT_ATOMICS(float)
EFLAT_ATOMICS(double)
#undef EFLAT_ATOMICS

template <class T>
T atomicCAS(T* p, T expected, T value) {
  static_assert(std::is_integral_v<T>);
  return host_cuda::atomically(p, [=](T before) { return before == expected ? value : before; });
}
template <class T>
T atomicMax(T* p, T value) {
  static_assert(std::is_integral_v<T>);
  return host_cuda::atomically(p, [=](T before) { return before < value ? value : before; });
}

#define EFLAT_SHARED_DYNAMIC(T, name) T* name = static_cast<T*>(host_cuda::dynamic_shared())
#define EFLAT_SHARED_STATIC(T, name, count) \
  static const char name##_declaration = 0; \
  T* name = static_cast<T*>(                \
      host_cuda::static_shared(&name##_declaration, (count) * sizeof(T), alignof(T)))
#define EFLAT_LAUNCH(kernel, grid, block, shared, stream, ...)          \
  host_cuda::launch(grid, block, shared, host_cuda::address_of(kernel), \
                    [&] { kernel(__VA_ARGS__); })

// The little of the runtime that launch.cu uses: host memory is device memory, streams are in
// order by themselves.
using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrSingleToDoublePrecisionPerfRatio,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock, numRegs, maxDynamicSharedSizeBytes;
};

namespace host_cuda {
template <class... Arguments>
const void* address_of(void (*kernel)(Arguments...)) {
  return reinterpret_cast<const void*>(kernel);
}
}  // namespace host_cuda

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
    case cudaDevAttrSingleToDoublePrecisionPerfRatio:
      *value = 2;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(host_cuda::kSharedBytesOptin);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <class... Arguments>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Arguments...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || size_t(bytes) > host_cuda::kSharedBytesOptin) return cudaErrorInvalidValue;
  host_cuda::allow_shared_bytes(host_cuda::address_of(kernel), size_t(bytes));
  return cudaSuccess;
}
template <class... Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Arguments...)) {
  *attributes = {0, host_cuda::kMaxThreads, 32, int(host_cuda::kSharedBytesOptin)};
  return cudaSuccess;
}
