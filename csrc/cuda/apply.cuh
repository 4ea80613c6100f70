// Stage 3: E = scale * [factor | grad] * weights, or its moving average, and the optimizer's step.
//
// Bytes: the target's factor and gradient and what was added to it, from L2 where reduce has read
// them lately; E once, its average twice, or once where it is what was added; with a step, per
// element of both factors: gradient, value and two moments read, value and moments written. Flops:
// 2 r^2 multiply-adds a row, in tiles of 64, 512 at r = 16. Onto both, the other side has blocks of
// its own, with its own weights. The optimizer's step, if there is one, comes last: of the block's
// rows, in blocks of both sides.
//
// The average may be what was added. Of a chunk it is read into shared memory before it is written,
// and no other block reads these rows any more.
//
// Block: a chunk of at most 128 rows and the weights in shared memory (ranks to kSharedRank;
// beyond, the weights come from the cache). A warp computes 16 rows by 2 or 4 tiles of columns; the
// results take the place of the chunk in shared memory, in the order of the output, and go out four
// neighbours at a time.
#pragma once
#include "solve.cuh"

namespace eflat::cuda {

// Results of a chunk in shared memory: `fast` neighbours in memory to a row. Rows are an odd number
// of 64 bytes apart, for the banks.
struct Results {
  bool transposed;
  int fast, ld;

  __device__ Results(const SideArgs& side, int r, int rows)
      : transposed(side.transposed), fast(side.transposed ? rows : r) {
    ld = ceil_div(fast, 8) * 8;
    if (ld % 16 == 0) ld += 8;
  }
};

// x[n] for n < count become E, or go into its moving average, from element i of `out` on.
template <class T>
__device__ void store(void* out, int64_t i, const double* x, int count, bool four,
                      const CallHeader& call) {
  T* p = static_cast<T*>(out) + i;
  Four<T> values;
  if (call.average) {
    if (four) {
      values = *reinterpret_cast<const Four<T>*>(p);
    } else {
      for (int n = 0; n < 4; ++n)
        if (n < count) values.x[n] = p[n];
    }
    EFLAT_UNROLL
    for (int n = 0; n < 4; ++n)
      values.x[n] = from_double<T>((1 - call.beta) * to_double(values.x[n]) + call.beta * x[n]);
  } else {
    EFLAT_UNROLL
    for (int n = 0; n < 4; ++n) values.x[n] = from_double<T>(x[n]);
  }
  if (four) {
    *reinterpret_cast<Four<T>*>(p) = values;
  } else {
    for (int n = 0; n < 4; ++n)
      if (n < count) p[n] = values.x[n];
  }
}

__device__ inline void store(const Block& block, int64_t i, const double* x, int count) {
  const CallHeader& call = *block.call;
  const bool four = block.side.out_vectors && count == 4;
  switch (block.pair.out_dtype) {
    case DType::f64:
      return store<double>(block.side.out, i, x, count, four, call);
    case DType::f32:
      return store<float>(block.side.out, i, x, count, four, call);
    case DType::bf16:
      return store<bf16>(block.side.out, i, x, count, four, call);
    default:
      return store<f16>(block.side.out, i, x, count, four, call);
  }
}

// A warp's 16 rows by kTiles tiles of a chunk's results.
template <class Math, int kTiles>
class ResultTiles {
 public:
  using Element = typename Math::Element;
  using Weight = typename Math::Weight;

  __device__ ResultTiles(int tiles) : tiles_(tiles) {
    const int groups = ceil_div(tiles, kTiles);
    row_ = warp() / groups * 16;
    tile_ = warp() % groups * kTiles;
  }

  // The layout of the output decides the order of operands: a lane's two results are neighbours.
  __device__ void multiply(const Element* z, const Chunk& chunk, const Weight* weights,
                           const double* packed, bool transposed) {
    EFLAT_UNROLL
    for (int c = 0; c < kTiles; ++c) sums_[0][c] = sums_[1][c] = Math::zero();
    const int steps = ceil_div(chunk.width, 4);
    EFLAT_ROLL
    for (int s = 0; s < steps; ++s) {
      const int column = 4 * s + lane() % 4;
      const Element x = z[chunk.at(row_ + lane() / 4, column)];
      const Element y = z[chunk.at(row_ + 8 + lane() / 4, column)];
      EFLAT_UNROLL
      for (int c = 0; c < kTiles; ++c) {
        if (tile_ + c >= tiles_) continue;
        const int e = (s * tiles_ + tile_ + c) * 32 + lane();
        const Weight w = weights ? weights[e] : Math::weight(packed[e]);
        if constexpr (sizeof(Weight) == sizeof(Element)) {
          Math::multiply_add(sums_[0][c], transposed ? w : x, transposed ? x : w);
          Math::multiply_add(sums_[1][c], transposed ? w : y, transposed ? y : w);
        } else if (transposed) {
          Math::multiply_add(sums_[0][c], w, x);
          Math::multiply_add(sums_[1][c], w, y);
        } else {
          Math::multiply_add(sums_[0][c], x, w);
          Math::multiply_add(sums_[1][c], y, w);
        }
      }
    }
  }

  __device__ void write(const Results& results, double scale, double* out) const {
    EFLAT_UNROLL
    for (int half = 0; half < 2; ++half) {
      EFLAT_UNROLL
      for (int c = 0; c < kTiles; ++c) {
        if (tile_ + c >= tiles_) continue;
        one_by_one();
        const int across = 8 * (tile_ + c), along = row_ + 8 * half;
        const int slow = (results.transposed ? across : along) + lane() / 4;
        const int fast = (results.transposed ? along : across) + lane() % 4 * 2;
        auto* two = reinterpret_cast<Two<double>*>(out + slow * results.ld + fast);
        *two = {scale * Math::first(sums_[half][c]), scale * Math::second(sums_[half][c])};
      }
    }
  }

  __device__ bool has_rows(int rows) const { return row_ < rows; }

 private:
  const int tiles_;
  int row_, tile_;
  typename Math::Sum sums_[2][kTiles];
};

// Rows [k, k + count) of the results go where they belong.
__device__ inline void write_out(Block& block, int ld, const double* results, int64_t k,
                                 int count) {
  const SideArgs& side = block.side;
  const int r = block.chunk.rank;
  const int fast = side.transposed ? count : r, slow = side.transposed ? r : count;
  const int fours = ceil_div(fast, 4);
  EFLAT_ROLL
  for (int e = threadIdx.x; e < slow * fours; e += kThreads) {
    const int i = e / fours, j = e % fours * 4, here = fast - j < 4 ? fast - j : 4;
    const int64_t at = side.transposed ? i * int64_t(side.length) + k + j : (k + i) * r + j;
    const auto* two = reinterpret_cast<const Two<double>*>(results + i * ld + j);
    const double x[4] = {two[0].x, two[0].y, two[1].x, two[1].y};
    store(block, at, x, here);
  }
}

// The block's rows of a side of a pair whose norm is usable.
template <class Math, bool kWide>
EFLAT_NOINLINE void apply(Block& block, void* space) {
  using Element = typename Math::Element;
  using Weight = typename Math::Weight;
  const SideArgs& side = block.side;
  const Chunk& chunk = block.chunk;
  const bool on_target = block.on_target;
  const Exponents& exponents = on_target ? block.result->exponents_t : block.result->exponents_o;
  const int tiles = ceil_div(chunk.rank, 8);
  auto* z = static_cast<Element*>(space);
  const double* packed = on_target ? block.space.packed_t : block.space.packed_o;
  Weight* weights = nullptr;
  if (chunk.rank <= kSharedRank) {
    weights = reinterpret_cast<Weight*>(static_cast<double*>(space) + stage_doubles(chunk));
    EFLAT_ROLL
    for (int e = threadIdx.x; e < ceil_div(chunk.width, 4) * tiles * 32; e += kThreads)
      weights[e] = Math::weight(packed[e]);
  }
  const double scale = block.result->scale * ldexp(1.0, exponents.sum);
  const StageScales scales{float(ldexp(1.0, -exponents.factor)),
                           float(ldexp(1.0, -exponents.grad))};
  Stage<Math> stage(side, chunk, scales, z);
  ResultTiles<Math, kWide ? 4 : 2> mine(tiles);
  auto* out = static_cast<double*>(space);
  for_chunks<kWide>(stage, block.begin, block.end, chunk.rows, [&](int64_t k, int count) {
    const Results results(side, chunk.rank, chunk.rows);
    if (mine.has_rows(count)) mine.multiply(z, chunk, weights, packed, side.transposed);
    __syncthreads();
    if (mine.has_rows(count)) mine.write(results, scale, out);
    __syncthreads();
    write_out(block, results.ld, out, k, count);
  });
}

// Writes the block's rows of a side of a pair that has no perturbation.
EFLAT_NOINLINE void apply_nothing(Block& block) {
  const SideArgs& side = block.side;
  const int r = block.pair.rank, rows = int(block.end - block.begin);
  EFLAT_ROLL
  for (int e = threadIdx.x; !block.call->average && e < rows * r; e += kThreads) {
    const double zeros[4] = {0, 0, 0, 0};
    const int64_t i = side.transposed ? e / rows * int64_t(side.length) + block.begin + e % rows
                                      : block.begin * r + e;
    store(block, i, zeros, 1);
  }
}

// The block's rows: of the target or, with a step or onto both, of the other side.
template <class Math, bool kWide, bool kStep>
__device__ void apply_block(Block& block, void* space) {
  const PairResult& result = *block.result;
  if (block.side.out) {
    if (!usable(result.norm)) {
      apply_nothing(block);
    } else if (result.again_t || result.again_o || block.side.dtype == DType::f64) {
      apply<Float64, kWide>(block, space);
    } else {
      apply<Math, kWide>(block, space);
    }
  }
  if constexpr (kStep) {
    const bool on_target = block.on_target;
    const AdamWArgs& args = on_target ? block.step->target : block.step->other;
    if (threadIdx.x == 0) block.adamw.set(block.hypers[args.hyper], args.step);
    __syncthreads();  // and no thread reads the old values any more
    step_rows(block.side, args, block.adamw, block.pair.rank, block.begin, block.end);
  }
}

}  // namespace eflat::cuda
