// All stages of a call in one launch.
//
// Blocks take tickets in the order in which they begin to run, and a ticket says what to do: pair
// after pair, the blocks that reduce it, then those of the second pass over an earlier pair
// (nothing to do, mostly), then those that apply a pair that is earlier still. The last block to
// reduce a pair solves it. So whoever waits does so for blocks with earlier tickets, which are
// running: any number of resident blocks is enough, one included. And apply finds in L2 what reduce
// has read a moment before. Shapes and the order of sums depend on the call alone: results repeat
// bit for bit.
#pragma once
#include "apply.cuh"

namespace eflat::cuda {

// Numbers of blocks of the pairs before pair l; l from 0 to count.
struct BlocksBefore {
  const CallHeader& call;
  const PairArgs* pairs;
  bool step;

  EFLAT_HD int apply_blocks(const PairArgs& p) const {
    return ceil_div(p.target.length, call.rows.apply) +
           (step || p.other.out ? ceil_div(p.other.length, call.rows.apply) : 0);
  }
  EFLAT_HD int reduce(int l) const {
    if (!call.reduces || l <= 0) return 0;
    if (l < call.count) return pairs[l].reduce_before;
    const PairArgs& p = pairs[call.count - 1];
    return p.reduce_before + gram_blocks(p, call.rows.reduce);
  }
  EFLAT_HD int second(int l) const {
    if (!call.second_pass || l <= 0) return 0;
    if (l < call.count) return pairs[l].second_before;
    const PairArgs& p = pairs[call.count - 1];
    return p.second_before + gram_blocks(p, call.rows.second);
  }
  EFLAT_HD int apply(int l) const {
    if (!call.applies || l <= 0) return 0;
    if (l < call.count) return pairs[l].apply_before;
    const PairArgs& p = pairs[call.count - 1];
    return p.apply_before + apply_blocks(p);
  }

  // Turn l: reduce pair l, the second pass of pair l - second_lag, apply pair l - apply_lag.
  EFLAT_HD int turns() const { return call.count + call.apply_lag; }
  EFLAT_HD int before_turn(int l) const {
    return reduce(l) + second(l - call.second_lag) + apply(l - call.apply_lag);
  }

  EFLAT_HD Task task(int ticket) const {
    int low = 0, high = turns();  // before_turn(low) <= ticket < before_turn(high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before_turn(middle) <= ticket ? low : high) = middle;
    }
    int index = ticket - before_turn(low);
    const int reduces = reduce(low + 1) - reduce(low);
    if (index < reduces) return {Stages::kReduce, low, index};
    index -= reduces;
    const int late = low - call.second_lag, seconds = second(late + 1) - second(late);
    if (index < seconds) return {Stages::kSecond, late, index};
    return {Stages::kApply, low - call.apply_lag, index - seconds};
  }
};

// The block's work, by one thread.
EFLAT_NOINLINE void make_plan(Block& block, const CallHeader& call, const PairArgs* pairs,
                              const StepArgs* steps, const Hyper* hypers) {
  block.call = &call;
  block.hypers = hypers;
  block.progress = reinterpret_cast<Progress*>(call.workspace);
  const int ticket = atomicAdd(&block.progress->ticket, 1) - call.tickets_before;
  block.task = BlocksBefore{call, pairs, steps != nullptr}.task(ticket);
  const int l = block.pair_number = call.first + block.task.pair;
  const PairArgs& p = block.pair = pairs[block.task.pair];
  block.step = steps ? steps + block.task.pair : nullptr;
  block.pair_progress = reinterpret_cast<PairProgress*>(call.workspace + kProgressBytes) + l;
  block.results = reinterpret_cast<PairResult*>(call.workspace + results_at(call.total));
  block.result = block.results + l;
  block.space =
      PairSpace(reinterpret_cast<double*>(call.workspace + int64_t(p.workspace) * kSpaceUnit), p,
                call.rows.reduce);
  int index = block.task.index, of_target, rows;
  const bool apply = block.task.stage == Stages::kApply;
  if (apply) {
    rows = call.rows.apply;
    of_target = ceil_div(p.target.length, rows);
  } else {
    rows = block.task.stage == Stages::kReduce ? call.rows.reduce : call.rows.second;
    of_target = gram_blocks(p.target, p.rank, rows);
  }
  const bool on_target = index < of_target;
  block.side = on_target ? p.target : p.other;
  if (!on_target) index -= of_target;
  const int width = width_of(block.side, p.rank);
  block.chunk = Chunk(p.rank, width, block.side.transposed);
  if (apply) {
    if (block.chunk.rows > 128) block.chunk.rows = 128;  // a warp has one share of the results
  } else {
    const int rounds = share_rounds(width);
    block.round = index % rounds;
    index /= rounds;
    block.partial = (on_target ? block.space.partial_t : block.space.partial_o) +
                    int64_t(index) * width * width;
  }
  block.begin = int64_t(index) * rows;
  block.end = block.begin + rows < block.side.length ? block.begin + rows : block.side.length;
  block.on_target = on_target;
}

template <class Arithmetic, bool kWide, bool kStep>
__device__ void perturb_block(const CallHeader& call, const PairArgs* pairs, const StepArgs* steps,
                              const Hyper* hypers, unsigned char* memory) {
  using Math = typename MathOf<Arithmetic>::type;
  Block& block = *reinterpret_cast<Block*>(memory);
  void* space = memory + kBlockBytes;
  if (threadIdx.x == 0) {
    make_plan(block, call, pairs, steps, hypers);
    block.two_float = std::is_same_v<Math, TwoFloat>;
  }
  __syncthreads();
  if (block.task.stage == Stages::kApply) {
    if (call.global_norm) {
      await(&block.progress->finished, 1, block);
    } else {
      await(&block.pair_progress->state, kReady, block);
    }
    return apply_block<Math, kWide, kStep>(block, space);
  }
  if (block.task.stage == Stages::kReduce) {
    if (block.side.dtype == DType::f64 || call.sums_in_float64) {
      reduce<Float64, kWide>(block.side, block.chunk, block.begin, block.end, block.round, space,
                             block.partial);
    } else {
      reduce<Math, kWide>(block.side, block.chunk, block.begin, block.end, block.round, space,
                          block.partial);
    }
  } else {
    if (await(&block.pair_progress->state, kSecondPass, block) != kSecondPass) return;
    second_reduce<kWide>(block.side, block.chunk, block.begin, block.end, block.round,
                         block.on_target ? block.space.bases_t : block.space.bases_o,
                         static_cast<double*>(space), block.partial);
  }
  const bool second = block.task.stage == Stages::kSecond;
  if (last_to_arrive(second ? &block.pair_progress->corrected : &block.pair_progress->reduced,
                     gram_blocks(block.pair, second ? call.rows.second : call.rows.reduce), block))
    solve(block, space);
}

// Blocks to an SM: two, 128 registers a thread, for small matrices; one for the sums of large ones.
template <class Arithmetic, bool kWide>
__global__ void __launch_bounds__(kThreads, kWide ? 1 : 2)
    perturb_kernel(EFLAT_GRID_CONSTANT(Call) call) {
  EFLAT_SHARED_DYNAMIC(unsigned char, memory);
  perturb_block<Arithmetic, kWide, false>(call, call.pairs, nullptr, nullptr, memory);
}

template <class Arithmetic, bool kWide>
__global__ void __launch_bounds__(kThreads, kWide ? 1 : 2)
    step_kernel(EFLAT_GRID_CONSTANT(StepCall) call) {
  EFLAT_SHARED_DYNAMIC(unsigned char, memory);
  perturb_block<Arithmetic, kWide, true>(call, call.pairs, call.steps, call.hypers, memory);
}

}  // namespace eflat::cuda
