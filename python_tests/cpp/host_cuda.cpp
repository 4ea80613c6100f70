// The scheduler of host_cuda.h. Compiled without ThreadSanitizer's instrumentation, since what it
// shares among fibers is no concern of the kernels.
#include "host_cuda.h"

#include <algorithm>
#include <cstdarg>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "barrier_names.h"
#include "fiber.h"

// The first race ends the program; and fibers, which never end, are not waited for at exit.
extern "C" const char* __tsan_default_options();
const char* __tsan_default_options() { return "halt_on_error=1:atexit_sleep_ms=0"; }

namespace host_cuda {

const Place* here = nullptr;

namespace {

// An address by which ThreadSanitizer knows an order.
using Order = uint64_t;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  const void* caller = nullptr;  // who waits
  Order order[2];                // one for each of two neighbouring generations
};

struct Block;

struct Thread {
  Place place;
  Block* block;
  bool done = true;
  Barrier* waits_for = nullptr;
  unsigned generation = 0;
  unsigned exchanges = 0;  // of the warp, so far: picks one of two buffers
  Fiber fiber;

  explicit Thread(Block* block);
  bool ready() const { return !done && !(waits_for && waits_for->generation == generation); }
};

// Not by memset, which ThreadSanitizer would see. p: aligned to 8 bytes.
void fill_with_nan(void* p, size_t bytes) {
  auto* words = static_cast<volatile uint64_t*>(p);
  auto* rest = static_cast<volatile unsigned char*>(p) + bytes / 8 * 8;
  for (size_t i = 0; i < bytes / 8; ++i) words[i] = ~uint64_t(0);
  for (size_t i = 0; i < bytes % 8; ++i) rest[i] = 0xff;
}

struct Warp {
  Barrier barrier;
  alignas(8) unsigned char slots[2][32][kSlotBytes];
};

// Shared memory, as large as asked for and no larger, so that an overrun is seen.
struct Shared {
  const void* declaration;
  size_t bytes;
  unsigned char* memory;

  Shared(const void* declaration, size_t bytes, size_t alignment)
      : declaration(declaration),
        bytes(bytes),
        memory(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(alignment)))),
        alignment_(alignment) {}
  Shared(Shared&& x) : Shared(x) { x.memory = nullptr; }
  ~Shared() {
    if (memory) ::operator delete(memory, std::align_val_t(alignment_));
  }

 private:
  Shared(const Shared&) = default;
  size_t alignment_;
};

// A block's place on the device, taken by one block after the other.
struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Shared> shared;  // dynamic, then static in order of declaration
  Barrier barrier;
  int size = 0, live = 0;
  int next = 0;           // the thread that goes on when this block does
  unsigned followed = 0;  // blocks that were here before
  Order order[2];         // from one block to the next, and from that to the one after
  Order declared;         // static shared memory
  // Known at the last fence; to be known at the next one; and what carries orders from and to
  // atomics, made when needed. One for all threads, since a fence beside a barrier counts for those
  // on its other side.
  Order fenced, pending;
  std::unique_ptr<Clock> from_fence, to_fence;

  Thread* next_ready(int first) {
    for (int i = first; i < size; ++i)
      if (threads[i]->ready()) return threads[i].get();
    for (int i = 0; i < first; ++i)
      if (threads[i]->ready()) return threads[i].get();
    return nullptr;
  }
};

struct Device {
  std::vector<std::unique_ptr<Block>> blocks;  // kept: fibers are expensive to make
  int resident = 1;
  bool strict_fences = false;
  uint64_t random = 0;
  int turn = 0;              // switches until another block's turn
  unsigned idle_sleeps = 0;  // since some thread did anything else
  const std::function<void()>* kernel = nullptr;
  Order launched, finished;
  std::unique_ptr<Fiber> scheduler;
  std::unordered_map<const void*, size_t> allowed_shared;

  Device() {
    const auto number = [](const char* name, int otherwise) {
      const char* text = std::getenv(name);
      return text ? std::atoi(text) : otherwise;
    };
    set_schedule(number("EFLAT_HOST_CUDA_BLOCKS", 1), number("EFLAT_HOST_CUDA_SEED", 0));
    strict_fences = number("EFLAT_HOST_CUDA_STRICT_FENCES", 0) != 0;
  }
  void set_schedule(int resident_blocks, unsigned seed) {
    if (resident_blocks < 1) fail("%d resident blocks; at least 1 is needed", resident_blocks);
    resident = resident_blocks;
    random = seed;
  }
  // splitmix64
  unsigned draw(unsigned below) {
    uint64_t x = random += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return unsigned((x ^ (x >> 31)) >> 32) % below;
  }
};

Device& device() {
  static Device* device = new Device;  // never destroyed: fibers never end
  return *device;
}
Thread* current = nullptr;

void open_if_complete(Barrier& barrier) {
  if (barrier.expected > 0 && barrier.arrived >= barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    device().idle_sleeps = 0;
  }
}

void switch_to(Fiber& from, Thread* to) {
  current = to;
  here = to ? &to->place : nullptr;
  from.switch_to(to ? to->fiber : *device().scheduler);
}

// Goes on with the block's next thread; with the scheduler when there is none, or the turn is over.
void yield(bool end_of_turn = false) {
  Thread& me = *current;
  Block& block = *me.block;
  const int first = int(me.place.thread.x) + 1;
  if (--device().turn < 0) end_of_turn = true;
  block.next = first;
  Thread* next = end_of_turn ? nullptr : block.next_ready(first);
  if (next != &me) switch_to(me.fiber, next);
}

void wait(Barrier& barrier, const void* caller) {
  Thread& me = *current;
  Order* order = &barrier.order[barrier.generation & 1];
  release(order);
  me.waits_for = &barrier;
  me.generation = barrier.generation;
  if (barrier.arrived++ == 0) barrier.caller = caller;
  if (!same_line(caller, barrier.caller))
    fail("threads wait for each other at different barriers, %s and %s",
         name_of(barrier.caller).c_str(), name_of(caller).c_str());
  open_if_complete(barrier);
  yield();
  me.waits_for = nullptr;
  acquire(order);
}

Warp& warp() { return current->block->warps[current->place.thread.x / 32]; }

void fiber_main() {
  current->fiber.entered();
  for (;;) {
    acquire(&device().launched);
    acquire(&current->block->order[(current->block->followed - 1) & 1]);
    (*device().kernel)();
    Thread& me = *current;
    release(&me.block->order[me.block->followed & 1]);
    release(&device().finished);
    device().idle_sleeps = 0;
    me.done = true;
    --me.block->live;
    // The other buffer may still be read.
    fill_with_nan(warp().slots[me.exchanges & 1][me.place.lane()], kSlotBytes);
    for (Barrier* barrier : {&me.block->barrier, &warp().barrier}) {
      --barrier->expected;  // the others need not wait for a thread that has ended
      if (barrier->arrived) open_if_complete(*barrier);
    }
    yield();
  }
}

void start(Block& block, unsigned index) {
  block.barrier.expected = block.live = block.size;
  block.next = 0;
  ++block.followed;
  for (Shared& shared : block.shared) fill_with_nan(shared.memory, shared.bytes);
  for (Warp& w : block.warps) {
    w.barrier.expected = 0;
    fill_with_nan(w.slots, sizeof(w.slots));
  }
  for (int i = 0; i < block.size; ++i) {
    Thread& t = *block.threads[i];
    t.place.block = {index, 0, 0};
    t.done = false;
    t.exchanges = 0;
    ++block.warps[i / 32].barrier.expected;
  }
}

[[noreturn]] void fail_deadlocked(const std::vector<Block*>& blocks) {
  std::map<std::string, int> waiting;
  for (Block* block : blocks)
    for (int i = 0; i < block->size; ++i)
      if (const Thread& t = *block->threads[i]; !t.done) ++waiting[name_of(t.waits_for->caller)];
  std::string where;
  for (const auto& [name, count] : waiting)
    where += "; " + std::to_string(count) + " threads wait at " + name;
  fail("deadlock: a barrier was not reached by all live threads%s", where.c_str());
}

}  // namespace

Thread::Thread(Block* block) : block(block), fiber(fiber_main) {}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "host_cuda: ");
  std::vfprintf(stderr, format, arguments);
  if (here) std::fprintf(stderr, " (block %u, thread %u)", here->block.x, here->thread.x);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::abort();
}

void set_schedule(int resident_blocks, unsigned seed) {
  device().set_schedule(resident_blocks, seed);
}

void set_strict_fences(bool strict) { device().strict_fences = strict; }

void allow_shared_bytes(const void* kernel, size_t bytes) {
  device().allowed_shared[kernel] = bytes;
}

void launch(dim3 grid, dim3 size, size_t shared_bytes, const void* kernel,
            const std::function<void()>& body) {
  Device& d = device();
  if (here) fail("a launch from within a kernel");
  if (grid.y != 1 || grid.z != 1 || size.y != 1 || size.z != 1)
    fail("grids and blocks have one dimension here");
  if (grid.x < 1 || size.x < 1 || size.x > kMaxThreads)
    fail("a launch of %u blocks of %u threads", grid.x, size.x);
  const auto allowed = d.allowed_shared.find(kernel);
  const size_t limit =
      std::max(kSharedBytes, allowed == d.allowed_shared.end() ? 0 : allowed->second);
  if (shared_bytes > limit)
    fail("%zu bytes of shared memory asked for, %zu are allowed", shared_bytes, limit);

  d.kernel = &body;
  d.scheduler = std::make_unique<Fiber>();
  std::vector<Block*> blocks;
  unsigned started = 0;
  for (; started < std::min(grid.x, unsigned(d.resident)); ++started) {
    if (d.blocks.size() <= started) d.blocks.push_back(std::make_unique<Block>());
    Block& block = *d.blocks[started];
    blocks.push_back(&block);
    block.size = int(size.x);
    while (block.threads.size() < size.x) block.threads.push_back(std::make_unique<Thread>(&block));
    for (unsigned i = 0; i < size.x; ++i)
      block.threads[i]->place = {{i, 0, 0}, {0, 0, 0}, size, grid};
    block.warps.resize((size.x + 31) / 32);
    block.shared.emplace_back(nullptr, shared_bytes, 16);
    start(block, started);
  }
  release(&d.launched);

  d.idle_sleeps = 0;
  while (!blocks.empty()) {
    const bool alone = d.resident == 1;
    d.turn = alone ? INT32_MAX : int(d.draw(3) == 0 ? d.draw(8) : d.draw(4 * size.x));
    const size_t first = alone ? 0 : d.draw(unsigned(blocks.size()));
    Thread* next = nullptr;
    for (size_t i = 0; i < blocks.size() && !next; ++i) {
      Block& block = *blocks[(first + i) % blocks.size()];
      next = block.next_ready(alone ? block.next : int(d.draw(size.x)));
    }
    if (!next) fail_deadlocked(blocks);
    Block& block = *next->block;
    switch_to(*d.scheduler, next);
    if (block.live > 0) continue;
    if (started < grid.x) {
      start(block, started++);
    } else {
      blocks.erase(std::find(blocks.begin(), blocks.end(), &block));
    }
  }
  acquire(&d.finished);
  for (auto& block : d.blocks) block->shared.clear();
}

void sync_threads() {
  const void* caller = __builtin_return_address(0);
  if (!Watch::watch().dropped(caller)) wait(current->block->barrier, caller);
}

void sync_warp() {
  const void* caller = __builtin_return_address(0);
  if (!Watch::watch().dropped(caller)) wait(warp().barrier, caller);
}

const Slots& exchange(unsigned mask, const void* value, size_t bytes) {
  if (mask != 0xffffffffu) fail("warp functions take the full mask only");
  Warp& w = warp();
  auto& slots = w.slots[current->exchanges++ & 1];
  if (w.barrier.arrived == 0 && w.barrier.expected < 32) fill_with_nan(slots, sizeof(slots));
  unsigned char* slot = slots[current->place.lane()];
  for (size_t i = 0; i < bytes; ++i) slot[i] = static_cast<const unsigned char*>(value)[i];
  wait(w.barrier, __builtin_return_address(0));
  return slots;
}

void sleep() {
  Device& d = device();
  constexpr unsigned kTooMany = 1 << 20;
  if (++d.idle_sleeps > kTooMany)
    fail("threads sleep for ever, for something that no resident block does");
  yield(true);
}

void interrupt() {
  Device& d = device();
  if (d.resident > 1 && here && d.draw(4) == 0) yield(true);
}

void fence() {
  if (Watch::watch().dropped(__builtin_return_address(0))) return;
  acquire(&current->block->pending);
  release(&current->block->fenced);
  interrupt();
}

void order_atomic(void* p) {
  if (!current || !device().strict_fences) {
    acquire(p);
    release(p);
    return;
  }
  Block& block = *current->block;
  if (!block.from_fence) {
    block.from_fence = std::make_unique<Clock>(*device().scheduler);
    block.to_fence = std::make_unique<Clock>(*device().scheduler);
  }
  block.from_fence->pass(&block.fenced, p);
  block.to_fence->pass(p, &block.pending);
}

void* dynamic_shared() { return current->block->shared[0].memory; }

void* static_shared(const void* declaration, size_t bytes, size_t alignment) {
  Block& block = *current->block;
  acquire(&block.declared);
  size_t total = bytes;
  for (size_t i = 1; i < block.shared.size(); ++i) {
    if (block.shared[i].declaration == declaration) return block.shared[i].memory;
    total += block.shared[i].bytes;
  }
  if (total > kSharedBytes) fail("%zu bytes of static shared memory", total);
  block.shared.emplace_back(declaration, bytes, std::max(alignment, size_t(8)));
  fill_with_nan(block.shared.back().memory, bytes);
  release(&block.declared);
  return block.shared.back().memory;
}

}  // namespace host_cuda
