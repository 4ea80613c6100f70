// Runs CUDA kernels on the CPU, for tests: each CUDA thread is a fiber, switched at barriers.
//
// Thread blocks run one after another, in order; the threads of a block take turns, each running
// until it waits. So a missing barrier gives wrong numbers for the thread that runs early. Shared
// memory is filled with NaN before each block. Warp functions take the full mask only, and a
// barrier that some live thread never reaches ends the program.
#pragma once
#include <sys/types.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ inline
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace host_cuda {

constexpr size_t kStackBytes = 64 << 10;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "host_cuda: %s\n", message);
  std::abort();
}

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  void open_if_complete() {
    if (expected > 0 && arrived >= expected) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Thread {
  int index;
  bool done;
  Barrier* waits_for;
  unsigned generation;
  unsigned exchanges;  // of the warp, so far: picks one of two buffers
  ucontext_t context;
  void* stack_pointer;
  std::unique_ptr<char[]> stack;
};

struct Warp {
  Barrier barrier;
  unsigned char slots[2][32][16];
};

struct BlockState {
  dim3 grid{1}, size{1}, index{0};
  unsigned char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  int live = 0;
  ucontext_t scheduler;
  void* scheduler_pointer = nullptr;
  std::function<void()> kernel;
};

inline BlockState* block = nullptr;
inline Thread* current = nullptr;

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, its pointer in *from, and goes on at `to`.
asm(R"(
.text
.weak host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch, .-host_cuda_switch
)");
extern "C" void host_cuda_switch(void** from, void* to);

inline void prepare(Thread& t, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(t.stack.get() + kStackBytes) & ~uintptr_t(15);
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // where the entry would return to; also aligns the stack
  *--sp = reinterpret_cast<void*>(entry);
  sp -= 6;
  std::memset(sp, 0, 6 * sizeof(void*));
  t.stack_pointer = sp;
}

inline void switch_to(Thread* from, Thread* to) {
  current = to;
  host_cuda_switch(from ? &from->stack_pointer : &block->scheduler_pointer,
                   to ? to->stack_pointer : block->scheduler_pointer);
}
#else
inline void prepare(Thread& t, void (*entry)()) {
  getcontext(&t.context);
  t.context.uc_stack.ss_sp = t.stack.get();
  t.context.uc_stack.ss_size = kStackBytes;
  t.context.uc_link = nullptr;
  makecontext(&t.context, entry, 0);
}

inline void switch_to(Thread* from, Thread* to) {
  current = to;
  swapcontext(from ? &from->context : &block->scheduler, to ? &to->context : &block->scheduler);
}
#endif

// Goes on with the next thread that can run; with the scheduler when none can.
inline void yield() {
  Thread* me = current;
  const int count = int(block->threads.size());
  Thread* next = nullptr;
  for (int i = 1; i <= count && !next; ++i) {
    Thread& t = block->threads[(me->index + i) % count];
    const bool waits = t.waits_for && t.waits_for->generation == t.generation;
    if (!t.done && !waits) next = &t;
  }
  if (next != me) switch_to(me, next);
}

inline void wait(Barrier& barrier) {
  current->waits_for = &barrier;
  current->generation = barrier.generation;
  ++barrier.arrived;
  barrier.open_if_complete();
  yield();
  current->waits_for = nullptr;
}

inline Warp& warp() { return block->warps[current->index / 32]; }

inline void thread_main() {
  block->kernel();
  current->done = true;
  --block->live;
  for (Barrier* barrier : {&block->barrier, &warp().barrier}) {
    --barrier->expected;  // the others need not wait for a thread that has ended
    if (barrier->arrived) barrier->open_if_complete();
  }
  yield();
  fail("a finished thread was resumed");
}

template <class Kernel>
void launch(dim3 grid, dim3 size, size_t shared_bytes, Kernel kernel) {
  BlockState state;
  state.grid = grid;
  state.size = size;
  state.kernel = kernel;
  const int count = int(size.x);
  state.threads.resize(count);
  std::vector<double> shared(shared_bytes / sizeof(double) + 1);
  state.shared = reinterpret_cast<unsigned char*>(shared.data());
  block = &state;
  for (unsigned x = 0; x < grid.x; ++x) {
    std::memset(shared.data(), 0xff, shared.size() * sizeof(double));
    state.index = dim3(x, 0, 0);
    state.live = state.barrier.expected = count;
    state.warps.assign((count + 31) / 32, Warp());
    for (int i = 0; i < count; ++i) {
      Thread& t = state.threads[i];
      t.index = i;
      t.done = false;
      t.waits_for = nullptr;
      t.exchanges = 0;
      ++state.warps[i / 32].barrier.expected;
      if (!t.stack) t.stack.reset(new char[kStackBytes]);
      prepare(t, &thread_main);
    }
    switch_to(nullptr, &state.threads[0]);
    if (state.live) fail("deadlock: a barrier was not reached by all live threads");
  }
  block = nullptr;
}

template <class T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 16);
  if (mask != 0xffffffffu) fail("warp functions take the full mask only");
  Warp& w = warp();
  auto& slots = w.slots[current->exchanges++ & 1];
  std::memcpy(slots[current->index % 32], &value, sizeof(T));
  wait(w.barrier);
  T result;
  std::memcpy(&result, slots[source], sizeof(T));
  return result;
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return unsigned(current->index); }
  } x;
};

}  // namespace host_cuda

inline host_cuda::ThreadIndex threadIdx;
#define blockIdx (host_cuda::block->index)
#define blockDim (host_cuda::block->size)
#define gridDim (host_cuda::block->grid)

inline void __syncthreads() { host_cuda::wait(host_cuda::block->barrier); }
inline void __syncwarp() { host_cuda::wait(host_cuda::warp().barrier); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return host_cuda::exchange(mask, value, (host_cuda::current->index % 32) ^ lanes);
}

#define EFLAT_SHARED_DYNAMIC(T, name) T* name = reinterpret_cast<T*>(host_cuda::block->shared)
#define EFLAT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  host_cuda::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })

// The little of the runtime that launch.cu uses: host memory is device memory.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNotSupported, cudaErrorStreamCaptureUnsupported };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) {
  return cudaSuccess;
}
enum { cudaMemcpyHostToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
