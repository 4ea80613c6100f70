// Kernels with one bug each: what host_cuda.h and the sanitizers must report. CTest runs each and
// looks for the report; without an argument, the bugs that only give wrong numbers.
#include <csignal>
#include <cstring>
#include <vector>

#include "check.h"
#include "host_cuda.h"

namespace {

constexpr int kThreads = 64;

// Thread t reads what thread t + 1 writes, which comes later.
__global__ void read_after_write(double* out) {
  EFLAT_SHARED_DYNAMIC(double, s);
  const int t = threadIdx.x;
  s[t] = t;
  out[t] = s[(t + 1) % kThreads];  // no barrier before
}

// Thread t reads what thread t + 1 overwrites, which comes later: right by luck.
__global__ void write_after_read(double* out) {
  EFLAT_SHARED_DYNAMIC(double, s);
  const int t = threadIdx.x;
  s[t] = t;
  __syncthreads();
  out[t] = t + 1 < kThreads ? s[t + 1] : 0;
  s[t] = -1;  // no barrier before
}

// The same within a warp, where the barriers are those of shuffles.
__global__ void write_after_read_in_a_warp(double* out) {
  EFLAT_SHARED_DYNAMIC(double, s);
  const int t = threadIdx.x;
  s[t] = __shfl_sync(0xffffffffu, double(t), t % 32);
  __syncwarp();
  out[t] = (t + 1) % 32 ? s[t + 1] : 0;
  s[t] = -1;  // no barrier before
}

// A barrier too few in a loop: one thread's next round against another's last.
__global__ void one_barrier_in_a_loop(double* out) {
  EFLAT_SHARED_DYNAMIC(double, s);
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i) {
    s[t] = t + i;
    __syncthreads();
    out[t] = t + 1 < kThreads ? s[t + 1] : 0;
  }
}

// Block 1 reads what block 0 wrote, with nothing to order them.
__global__ void block_after_block(double* out) {
  if (threadIdx.x == 0) out[blockIdx.x + 1] = blockIdx.x > 0 ? out[blockIdx.x] : 0;
}

// Block 1 waits for block 0 and reads what it wrote; a fence is missing on one side.
template <bool kFenceBefore, bool kFenceAfter>
__global__ void message(double* out) {
  if (threadIdx.x != 0) return;
  unsigned* flag = reinterpret_cast<unsigned*>(out + 1);
  if (blockIdx.x == 0) {
    *out = 5;
    if (kFenceBefore) __threadfence();
    atomicAdd(flag, 1u);
  } else {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(100);
    if (kFenceAfter) __threadfence();
    *out += 1;
  }
}

// The same for whole blocks: every thread writes and reads, thread 0 counts.
template <bool kFenceBefore, bool kFenceAfter>
__global__ void last_block(double* out) {
  EFLAT_SHARED_STATIC(unsigned, ticket, 1);
  out[2 + blockIdx.x * kThreads + threadIdx.x] = 1;
  if (kFenceBefore) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *ticket = atomicAdd(reinterpret_cast<unsigned*>(out), 1u);
  __syncthreads();
  if (*ticket != gridDim.x - 1) return;
  if (kFenceAfter) __threadfence();
  atomicAdd(out + 1, out[2 + (1 - blockIdx.x) * kThreads + threadIdx.x]);
}

// Fences, but not between the write and the flag.
__global__ void early_fence(double* out) {
  if (threadIdx.x != 0) return;
  unsigned* flag = reinterpret_cast<unsigned*>(out + 1);
  __threadfence();
  if (blockIdx.x == 0) *out = 5;
  if (blockIdx.x == 0) atomicAdd(flag, 1u);
  while (atomicAdd(flag, 0u) == 0) __nanosleep(100);
  __threadfence();
  if (blockIdx.x == 1) *out += 1;
}

// Flags of other blocks are no plain variables.
__global__ void plain_flag(double* out) {
  volatile double* flag = out;
  if (blockIdx.x == 0 && threadIdx.x == 0) *flag = 1;
  if (blockIdx.x == 1 && threadIdx.x == 0)
    while (*flag == 0) __nanosleep(100);
}

__global__ void divergent_barrier(double*) {
  if (threadIdx.x < 40) __syncthreads();
  __shfl_xor_sync(0xffffffffu, 1.0, 1);
  if (threadIdx.x >= 40) __syncwarp();
}

__global__ void different_barriers(double* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

__global__ void endless_sleep(double* out) {
  if (threadIdx.x == 3)
    while (atomicAdd(out, 0.0) == 0) __nanosleep(100);
  __syncthreads();
}

__global__ void partial_mask(double*) { __shfl_xor_sync(0xffffu, 1.0, 1); }

__global__ void dynamic_overrun(double* out) {
  EFLAT_SHARED_DYNAMIC(double, s);
  out[threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void static_overrun(double* out) {
  EFLAT_SHARED_STATIC(int, s, kThreads - 1);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[0];
}

__global__ void stack_overrun(double* out) {
  double x[4] = {1, 2, 3, 4};
  out[threadIdx.x] = x[(threadIdx.x + 1) % 5];
}

__global__ void misaligned(double* out) {
  const float4 v = *reinterpret_cast<const float4*>(out + 1);
  out[0] = v.x;
}

// No bug: both barriers can be left out, one at a time.
__global__ void needless_barrier(double* out) {
  EFLAT_SHARED_DYNAMIC(double, s);
  const int t = threadIdx.x;
  s[t] = t;
  __syncthreads();
  __syncthreads();
  out[t] = s[kThreads - 1 - t];
}

__global__ void nothing(double*) {}

double out[2 * kThreads + 2];

bool run(const char* name) {
#define KERNEL(kernel, blocks, shared)                            \
  if (std::strcmp(name, #kernel) == 0) {                          \
    EFLAT_LAUNCH(kernel, blocks, kThreads, shared, nullptr, out); \
    return true;                                                  \
  }
  constexpr int kDoubles = kThreads * sizeof(double);
  host_cuda::set_schedule(2, 1);
  host_cuda::set_strict_fences(true);
  constexpr auto no_fence_before = message<false, true>, no_fence_after = message<true, false>;
  constexpr auto fences = message<true, true>, fences_for_all = last_block<true, true>;
  constexpr auto no_fence_before_all = last_block<false, true>;
  constexpr auto no_fence_after_all = last_block<true, false>;
  KERNEL(no_fence_before, 2, 0)
  KERNEL(no_fence_after, 2, 0)
  KERNEL(early_fence, 2, 0)
  KERNEL(fences, 2, 0)
  KERNEL(no_fence_before_all, 2, 0)
  KERNEL(no_fence_after_all, 2, 0)
  KERNEL(fences_for_all, 2, 0)
  KERNEL(block_after_block, 2, 0)
  KERNEL(plain_flag, 2, 0)
  KERNEL(write_after_read_in_a_warp, 1, kDoubles)
  host_cuda::set_schedule(1, 0);
  KERNEL(read_after_write, 1, kDoubles)
  KERNEL(write_after_read, 1, kDoubles)
  KERNEL(one_barrier_in_a_loop, 1, kDoubles)
  KERNEL(divergent_barrier, 1, 0)
  KERNEL(different_barriers, 1, 0)
  KERNEL(endless_sleep, 1, 0)
  KERNEL(needless_barrier, 1, kDoubles)
  KERNEL(partial_mask, 1, 0)
  KERNEL(dynamic_overrun, 1, kDoubles)
  KERNEL(static_overrun, 1, 0)
  KERNEL(stack_overrun, 1, 0)
  KERNEL(misaligned, 1, 0)
  if (std::strcmp(name, "too_much_shared_memory") == 0)
    EFLAT_LAUNCH(nothing, 1, 1, 48 * 1024 + 1, nullptr, out);
  return false;
}

}  // namespace

int main(int count, char** arguments) {
  std::signal(SIGABRT, [](int) { std::_Exit(1); });  // CTest takes a signal for a failure
  if (count > 1) {
    CHECK(run(arguments[1]), "%s is no bug known here", arguments[1]);
    std::printf("%s was not reported\n", arguments[1]);
    return 0;
  }
  run("read_after_write");
  for (int t = 0; t < kThreads; ++t)
    CHECK(t + 1 < kThreads ? std::isnan(out[t]) : out[t] == 0, "thread %d read %g", t, out[t]);
  run("fences");
  CHECK(out[0] == 6, "%g", out[0]);
  out[0] = out[1] = 0;
  run("fences_for_all");
  CHECK(out[1] == kThreads, "%g", out[1]);
  run("write_after_read");
  for (int t = 0; t + 1 < kThreads; ++t) CHECK(out[t] == t + 1, "thread %d read %g", t, out[t]);
  std::puts("planted bugs: 1 passed, 0 failed");
}
