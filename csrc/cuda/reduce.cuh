// Stage 1: Gram matrices of the rows of a side, [factor | grad]^T [factor | grad].
//
// Bytes: factor and gradient once, 2r elements a row; partial sums, 8 (2r)^2 / 2 bytes per block
// written and read again: 1/16 of it at 512 rows of float32 and r = 16.
// Flops: r (2r + 1) multiply-adds a row, in tiles of 64, symmetric halves once: 640 at r = 16.
// Floor: at r = 16, float32, H100: 128 bytes, 0.038 ns, of memory against 0.019 ns of float64
// tensor cores; they draw level at r = 32 and at r = 64 the tensor cores take twice the time of
// memory. Block: 8 warps, one chunk of rows in shared memory (stage.cuh). A chunk is in flight to
// registers while the one before is multiplied. Of small matrices every warp sums some rows of all
// tiles, and the sums are added in the order of the warps; of large ones every warp has its own
// tiles.
#pragma once
#include "stage.cuh"

namespace eflat::cuda {

// This lane's entry of a fragment.
__device__ inline int fragment_entry() {
  const int k = lane() % 4, i = lane() / 4;
  return 8 * k + (i ^ (k & 2) * 2);
}

// A warp's share of a Gram matrix, see call.h: tiles of squares (I, J), or of (I, I) and (J, J).
// Wide: for more than one square.
template <class Math, bool kWide>
class GramShare {
 public:
  using Element = typename Math::Element;
  static constexpr int kTiles = kWide ? 20 : 10;

  __device__ GramShare(const Chunk& chunk, int round) : tiles_(chunk.tiles) {
    const int shares = kWide ? share_count(chunk.width) : 1;
    int share = round * kWarps + warp();
    ways_ = shares <= kWarps / 2 ? kWarps / shares : 1;
    way_ = shares <= kWarps / 2 ? share / shares : 0;
    // Warps w and w + 4 run on the same quarter of an SM: of different shares, they balance.
    if (shares <= kWarps / 2) share = (share + share / 4) % shares;
    share_ = share;
    if (share >= shares || way_ >= ways_) way_ = ways_;  // idle
    I_ = J_ = 0;
    off_diagonal_ = false;
    if constexpr (kWide) {
      const int squares = square_count(chunk.width), off = off_diagonal_shares(chunk.width);
      off_diagonal_ = share < off;
      if (off_diagonal_) {
        for (int left = squares - 1; share >= left; --left) {
          share -= left;
          ++I_;
        }
        J_ = I_ + 1 + share;
      } else {
        I_ = 2 * (share - off);
        J_ = I_ + 1;
      }
    }
    EFLAT_UNROLL
    for (int i = 0; i < kTiles; ++i) sums_[i] = Math::zero();
  }

  // Adds `rows` staged rows.
  __device__ void add(const Element* z, const Chunk& chunk, int rows) {
    if (way_ == ways_) return;
    const int stride = chunk.stride;
    z += fragment_entry();
    if (off_diagonal_) {
      add_off_diagonal(z, stride, rows);
    } else {
      EFLAT_ROLL
      for (int s = way_; s < rows / 4; s += ways_) {
        Element x[4];
        load(z + s * stride, I_, x);
        add_square<0>(I_, x);
        if constexpr (kWide) {
          load(z + s * stride, J_, x);
          add_square<10>(J_, x);
        }
      }
    }
    EFLAT_UNROLL
    for (int i = 0; i < kTiles; ++i) Math::settle(sums_[i]);
  }

  // out (width, width), upper triangle, *= the inverse scales. `shared`: for sums of several warps.
  __device__ void write(const Chunk& chunk, StageScales scales, double* shared, double* out) {
    double* mine = shared + share_ * (kTiles * 64) + 2 * lane();
    if (ways_ > 1) {
      for (int turn = 0; turn < ways_; ++turn) {
        __syncthreads();
        if (turn != way_) continue;
        EFLAT_UNROLL
        for (int i = 0; i < kTiles; ++i) {
          one_by_one();
          double* p = mine + i * 64;
          p[0] = Math::first(sums_[i]) + (turn ? p[0] : 0.0);
          p[1] = Math::second(sums_[i]) + (turn ? p[1] : 0.0);
        }
      }
      __syncthreads();
    }
    if (way_ != 0) return;
    const double of_factor = 1 / double(scales.factor), of_grad = 1 / double(scales.grad);
    EFLAT_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      if (off_diagonal_ && i >= 16) continue;
      one_by_one();
      const double x = ways_ > 1 ? mine[i * 64] : Math::first(sums_[i]);
      const double y = ways_ > 1 ? mine[i * 64 + 1] : Math::second(sums_[i]);
      int a, b;
      place(i, a, b);
      const int row = 8 * a + lane() / 4, column = 8 * b + 2 * (lane() % 4);
      for (int n = 0; n < 2; ++n) {
        if (row >= chunk.width || column + n >= chunk.width) continue;
        const double f = row < chunk.rank ? of_factor : of_grad;
        const double g = column + n < chunk.rank ? of_factor : of_grad;
        out[row * chunk.width + column + n] = (n ? y : x) * f * g;
      }
    }
  }

 private:
  __device__ void load(const Element* z, int square, Element (&x)[4]) const {
    EFLAT_UNROLL
    for (int a = 0; a < 4; ++a) {
      const int tile = 4 * square + a;
      x[a] = tile < tiles_ ? z[34 * tile] : Element(0);
    }
  }

  __device__ void add_off_diagonal(const Element* z, int stride, int rows) {
    if constexpr (kWide) {
      EFLAT_ROLL
      for (int s = way_; s < rows / 4; s += ways_) {
        Element x[4], y[4];
        load(z + s * stride, I_, x);
        load(z + s * stride, J_, y);
        EFLAT_UNROLL
        for (int i = 0; i < 16; ++i)
          if (4 * J_ + i % 4 < tiles_) Math::multiply_add(sums_[i], x[i / 4], y[i % 4]);
      }
    }
  }

  template <int kFirst>
  __device__ void add_square(int square, const Element (&x)[4]) {
    EFLAT_UNROLL
    for (int i = 0; i < 10; ++i) {
      const int a = row_of(i), b = column_of(i);
      if (4 * square + b < tiles_) Math::multiply_add(sums_[kFirst + i], x[a], x[b]);
    }
  }

  // Row and column of tile i of the upper half of a square.
  __device__ static constexpr int row_of(int i) { return (i >= 4) + (i >= 7) + (i >= 9); }
  __device__ static constexpr int column_of(int i) {
    return i - (i >= 4 ? 3 : 0) - (i >= 7 ? 2 : 0) - (i >= 9 ? 1 : 0);
  }

  // Tile number i of this share is tile (a, b) of the matrix.
  __device__ void place(int i, int& a, int& b) const {
    if (off_diagonal_) {
      a = 4 * I_ + i / 4;
      b = 4 * J_ + i % 4;
      return;
    }
    a = 4 * (i < 10 ? I_ : J_) + row_of(i % 10);
    b = 4 * (i < 10 ? I_ : J_) + column_of(i % 10);
  }

  const int tiles_;
  int share_, ways_, way_;  // the ways_ warps of a share take every ways_-th fragment of rows
  int I_, J_;
  bool off_diagonal_;
  typename Math::Sum sums_[kTiles];
};

// Stages rows [begin, end) chunk by chunk, body(first row, rows) between barriers. kAhead: a chunk
// is read while the body works on the one before, at the price of 16 registers.
template <bool kAhead, class Math, class Body>
__device__ void for_chunks(Stage<Math>& stage, int64_t begin, int64_t end, int rows, Body body) {
  auto count = [&](int64_t k) { return int(end - k < rows ? end - k : rows); };
  if (kAhead) stage.read(begin, count(begin));
  for (int64_t k = begin; k < end; k += rows) {
    if (!kAhead) stage.read(k, count(k));
    __syncthreads();
    stage.write();
    __syncthreads();
    if (kAhead && k + rows < end) stage.read(k + rows, count(k + rows));
    body(k, count(k));
  }
}

// The power of two that brings the largest magnitude of some rows of the factor's point or of the
// gradient to [1, 2). shared: kWarps.
__device__ inline float normalising_scale(const SideArgs& side, bool grad, int r, int64_t begin,
                                          int64_t end, double* shared) {
  double largest = 0;
  const int rows = int(end - begin);
  const void *matrix = grad ? side.grad : side.factor, *added = grad ? nullptr : side.added;
  EFLAT_ROLL
  for (int e = threadIdx.x; matrix && e < rows * r; e += kThreads) {
    const int64_t at =
        side.transposed ? e / rows * int64_t(side.length) + begin + e % rows : begin * r + e;
    largest = fmax(largest, fabs(element(matrix, added, side.dtype, at)));
  }
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  __syncthreads();
  if (lane() == 0) shared[warp()] = largest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) largest = fmax(largest, shared[w]);
  const int exponent = largest > 0 && largest < HUGE_VAL ? ilogb(largest) : 0;
  return float(ldexp(1.0, exponent < -120 ? 120 : exponent > 120 ? -120 : -exponent));
}

// out = Gram matrix, upper triangle, of rows [begin, end) of [factor | grad], or of the factor.
template <class Math, bool kWide>
EFLAT_NOINLINE void reduce(const SideArgs& side, const Chunk& chunk, int64_t begin, int64_t end,
                           int round, void* space, double* out) {
  auto* z = static_cast<typename Math::Element*>(space);
  StageScales scales;
  if constexpr (sizeof(*z) == 4) {
    auto* sums = static_cast<double*>(space);
    scales.factor = normalising_scale(side, false, chunk.rank, begin, end, sums);
    scales.grad = normalising_scale(side, true, chunk.rank, begin, end, sums);
    __syncthreads();
  }
  Stage<Math> stage(side, chunk, scales, z);
  GramShare<Math, kWide> share(chunk, round);
  // Two floats' products are slow, and their sums of large matrices leave no registers to read
  // ahead.
  constexpr bool kAhead = !kWide || sizeof(*z) == 8;
  for_chunks<kAhead>(stage, begin, end, chunk.rows,
                     [&](int64_t, int) { share.add(z, chunk, chunk.rows); });
  share.write(chunk, scales, static_cast<double*>(space), out);
}

// The bases of a second pass as fragments: T where columns of the factor meet, T_grad of gradients.
// Entry (k, j) of the (2r, 2r) matrix, zeros beyond, is at the lane 4 (j % 8) + k % 4 of fragment
// (k / 4, j / 8).
__device__ inline void pack_bases(int r, const double* T, const double* T_grad, double* packed) {
  const int tiles = ceil_div(2 * r, 8), steps = ceil_div(2 * r, 4);
  EFLAT_ROLL
  for (int e = threadIdx.x; e < steps * tiles * 32; e += kThreads) {
    const int k = e / 32 / tiles * 4 + e % 4, j = e / 32 % tiles * 8 + e % 32 / 4;
    double x = 0;
    if (k < r && j < r) x = T[k * r + j];
    if (k >= r && j >= r && k < 2 * r && j < 2 * r) x = T_grad[(k - r) * r + j - r];
    packed[e] = x;
  }
}

// Reduces [factor * T | grad * T_grad] in float64. The upper half of the staged rows' space
// holds the products.
template <bool kWide>
EFLAT_NOINLINE void second_reduce(const SideArgs& side, const Chunk& chunk, int64_t begin,
                                  int64_t end, int round, const double* bases, double* z,
                                  double* out) {
  const int rows = chunk.rows / 2;
  double* y = z + rows / 4 * chunk.stride;
  Stage<Float64> stage(side, chunk, {}, z);
  GramShare<Float64, kWide> share(chunk, round);
  for_chunks<false>(stage, begin, end, rows, [&](int64_t, int) {
    const int r = chunk.rank, tiles = chunk.tiles;
    EFLAT_ROLL
    for (int u = warp(); u < rows / 8 * tiles; u += kWarps) {
      const int row = u / tiles * 8, tile = u % tiles;
      // The bases are block-diagonal.
      const int first = 8 * tile >= r ? r / 4 : 0;
      const int last = ceil_div(8 * tile + 8 <= r ? r : 2 * r, 4);
      Float64::Sum sum = Float64::zero();
      EFLAT_ROLL
      for (int s = first; s < last; ++s) {
        const double base = bases[(s * tiles + tile) * 32 + lane()];
        const double x = z[chunk.at(row + lane() / 4, 4 * s + lane() % 4)];
        Float64::multiply_add(sum, base, x);
      }
      const int column = 8 * tile + lane() / 4, pair = row + lane() % 4 * 2;
      y[chunk.at(pair, column)] = sum.x;
      y[chunk.at(pair + 1, column)] = sum.y;
    }
    __syncthreads();
    share.add(y, chunk, rows);
  });
  share.write(chunk, {}, z, out);
}

}  // namespace eflat::cuda
