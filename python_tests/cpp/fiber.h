// A function on a stack of its own, which goes on where it left off; for host_cuda.cpp. Sanitizers
// are told of every switch, if the program has one.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
#define EFLAT_WEAK __attribute__((weak))  // null without the sanitizer
void __sanitizer_start_switch_fiber(void**, const void*, size_t) EFLAT_WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) EFLAT_WEAK;
void __sanitizer_symbolize_pc(void*, const char*, char*, size_t) EFLAT_WEAK;
void* __tsan_get_current_fiber() EFLAT_WEAK;
void* __tsan_create_fiber(unsigned) EFLAT_WEAK;
void __tsan_switch_to_fiber(void*, unsigned) EFLAT_WEAK;
void __tsan_acquire(void*) EFLAT_WEAK;
void __tsan_release(void*) EFLAT_WEAK;
#undef EFLAT_WEAK
}

namespace host_cuda {

// Orders all before release(p) in its thread before all after acquire(p) in another.
inline void acquire(void* p) {
  if (__tsan_acquire) __tsan_acquire(p);
}
inline void release(void* p) {
  if (__tsan_release) __tsan_release(p);
}

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, its pointer in *from, and goes on at `to`:
// twenty times faster than swapcontext, which makes a system call.
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
#endif

class Fiber {
 public:
  // The stack that runs already.
  Fiber() : tsan_(__tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr) {}

  // `entry` must call entered() first, and must not return.
  explicit Fiber(void (*entry)())
      : size_(kStackBytes), tsan_(__tsan_create_fiber ? __tsan_create_fiber(0) : nullptr) {
    constexpr size_t kGuard = 4096;  // an overflow of the stack is a segmentation fault
    char* memory = static_cast<char*>(mmap(nullptr, kGuard + kStackBytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) {
      std::perror("host_cuda: stack of a thread");
      std::abort();
    }
    mprotect(memory, kGuard, PROT_NONE);
    bottom_ = memory + kGuard;
#if defined(__x86_64__)
    void** sp = reinterpret_cast<void**>(memory + kGuard + kStackBytes);
    *--sp = nullptr;  // where the entry would return to; also aligns the stack
    *--sp = reinterpret_cast<void*>(entry);
    sp -= 6;
    std::memset(sp, 0, 6 * sizeof(void*));
    stack_pointer_ = sp;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory + kGuard;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  Fiber(const Fiber&) = delete;

  // Goes on with `to`; returns when something goes on with this one. No order in the eyes of
  // ThreadSanitizer: that is for barriers and atomics to make.
  void switch_to(Fiber& to) {
    previous() = this;
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
    constexpr unsigned kNoSync = 1;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_, kNoSync);
#if defined(__x86_64__)
    host_cuda_switch(&stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
    entered();
  }

  void* tsan() const { return tsan_; }

  void entered() {
    Fiber& from = *previous();
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(fake_stack_, &from.bottom_, &from.size_);
  }

 private:
  static constexpr size_t kStackBytes = 256 << 10;

  static Fiber*& previous() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  const void* bottom_ = nullptr;  // of the first fiber: known once it was left
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// Passes orders on that are not the running thread's own.
class Clock {
 public:
  // Knows at first what `maker` knows.
  explicit Clock(const Fiber& maker) {
    if (!__tsan_create_fiber) return;
    void* me = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(maker.tsan(), 1);
    tsan_ = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(me, 1);
  }
  Clock(const Clock&) = delete;

  // Releases at `to` all that is released at `from`.
  void pass(void* from, void* to) {
    if (!tsan_) return;
    void* me = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, 1);
    acquire(from);
    release(to);
    __tsan_switch_to_fiber(me, 1);
  }

 private:
  void* tsan_ = nullptr;
};

}  // namespace host_cuda
