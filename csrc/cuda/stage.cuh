// A chunk of rows of [factor | grad], read from memory and laid out in shared memory for mma. Where
// something was added to the factor, it is read beside it, and the factor's point is laid out.
//
// Column j and row k of the chunk lie in fragment (k / 4, j / 8), 4 rows by 8 columns: what one mma
// takes as an operand. Within it, entry (k, i) is at 8 k + (i ^ 4 (k / 2)), so that a warp reads a
// fragment, and the rows of four of them, without two lanes meeting in a bank. Fragments are two
// entries further apart than they need be, and four rows an odd number from the next four where a
// thread writes four neighbours of a column: so these writes meet as little as 8-byte entries can
// for a transposed side of r = 8, 16, 32, or for another of r = 16; twice as often else. Columns
// beyond the width, up to a multiple of 8, are zero.
//
// Both layouts of a side end up the same: B (n, r) is read along its rows, A (r, m) along m. Each
// thread reads four times four neighbours (16 bytes of float32), neighbouring threads neighbouring
// fours, all in flight before the first is stored; what was added is on its way to L2 meanwhile.
#pragma once
#include "arithmetic.cuh"
#include "call.h"

namespace eflat::cuda {

constexpr int kStageElements = 4672;  // 37 KiB of float64: three blocks share an SM
constexpr int kFours = 4;             // per thread

// The shape of a staged chunk.
struct Chunk {
  int rank, width;  // columns: r, or 2r with a gradient
  int tiles;        // of 8 columns
  int stride;       // entries from 4 rows to the next 4; even but where `transposed`
  int rows;         // multiple of 16

  Chunk() = default;
  EFLAT_HD constexpr Chunk(int rank, int width, bool transposed)
      : rank(rank), width(width), tiles(ceil_div(width, 8)) {
    stride = 34 * tiles;
    stride += transposed && tiles <= 8 ? 1 : (18 - stride % 16) % 16;
    int fit = kStageElements / stride * 4;
    if (fit > 4 * kFours * kThreads / width) fit = 4 * kFours * kThreads / width;
    rows = fit < 16 ? 16 : fit > 512 ? 512 : fit / 16 * 16;
  }
  EFLAT_HD constexpr int elements() const { return rows / 4 * stride; }
  EFLAT_HD int at(int row, int column) const {
    const int k = row % 4, i = column % 8;
    return row / 4 * stride + column / 8 * 34 + 8 * k + (i ^ (k & 2) * 2);
  }
};

// A chunk in float64 takes so many doubles, rounded up to keep the next array aligned.
EFLAT_HD constexpr int64_t stage_doubles(const Chunk& chunk) {
  return (chunk.elements() + 1) / 2 * 2;
}

// Powers of two that factor and gradient are multiplied by.
struct StageScales {
  float factor = 1, grad = 1;
};

template <class Element>
struct alignas(2 * sizeof(Element)) Two {
  Element x, y;
};

template <class Math>
class Stage {
 public:
  using Element = typename Math::Element;

  __device__ Stage(const SideArgs& side, const Chunk& chunk, StageScales scales, Element* z)
      : side_(side), chunk_(chunk), scales_(scales), z_(z) {
    // The vector path is for what training meets: ranks to 64 of up to 4 bytes an element.
    vectors_ =
        side.vectors && side.dtype != DType::f64 && chunk.rows * chunk.width <= 16 * kThreads;
    if (vectors_) place_fours();
  }

  // Begins to read rows [begin, begin + count). count: at most chunk.rows; what is beyond is zero.
  __device__ void read(int64_t begin, int count) {
    begin_ = begin;
    count_ = count;
    if (!vectors_) return;
    if (side_.dtype == DType::f32) {
      read_fours<uint4>();
    } else {
      read_fours<uint2>();
    }
  }

  // Writes what was read to shared memory; the caller synchronises before and after.
  __device__ void write() {
    const int beyond = 8 * chunk_.tiles - chunk_.width;
    EFLAT_ROLL
    for (int e = threadIdx.x; e < chunk_.rows * beyond; e += kThreads)
      z_[chunk_.at(e / beyond, chunk_.width + e % beyond)] = 0;
    if (!vectors_) return write_elements();
    switch (side_.dtype) {
      case DType::f32:
        return write_fours<float>();
      case DType::bf16:
        return write_fours<bf16>();
      default:
        return write_fours<f16>();
    }
  }

 private:
  // Chooses this thread's fours of a chunk and their places: the first half are the factor's,
  // and the others the gradient's, if there is one.
  __device__ void place_fours() {
    const int r = chunk_.rank, rows = chunk_.rows, total = rows * r / 4;
    const int along = side_.transposed ? rows / 4 : r / 4;
    EFLAT_UNROLL
    for (int u = 0; u < kFours; ++u) {
      const int matrix = u >= kFours / 2 && side_.grad;
      const int four = threadIdx.x + (matrix ? u - kFours / 2 : u) * kThreads;
      const int row = side_.transposed ? four % along * 4 : four / along;
      const int column = side_.transposed ? four / along : four % along * 4;
      const int j = matrix * r + column;
      const int grad = matrix ? kGrad : 0, high = j & 4 ? kHigh : 0;
      place_[u] = four < total ? chunk_.at(row, j) | row << kRowShift | grad | high : kNone;
      offset_[u] = side_.transposed ? column * side_.length + row : row * r + column;
    }
  }

  template <class Raw>
  __device__ void read_fours() {
    constexpr int kSize = sizeof(Raw) / 4;
    const int64_t begin = side_.transposed ? begin_ : begin_ * chunk_.rank;
    EFLAT_UNROLL
    for (int u = 0; u < kFours; ++u) {
      recompute_from(place_[u]);
      Raw raw{};
      if (row_of(place_[u]) < count_) {
        const void* matrix = place_[u] & kGrad ? side_.grad : side_.factor;
        raw = read_once(reinterpret_cast<const Raw*>(static_cast<const char*>(matrix) +
                                                     (begin + offset_[u]) * kSize));
      }
      memcpy(&raw_[u], &raw, sizeof(Raw));
    }
    if (!side_.added) return;
    EFLAT_UNROLL
    for (int u = 0; u < kFours / 2; ++u) {
      recompute_from(place_[u]);
      if (row_of(place_[u]) < count_) prefetch(added_four(u));
    }
  }

  // The addends of four elements of the factor, read late: held until the write, they would take
  // registers.
  __device__ const float4* added_four(int u) const {
    const int64_t begin = side_.transposed ? begin_ : begin_ * chunk_.rank;
    return static_cast<const float4*>(side_.added) + (begin + offset_[u]) / 4;
  }

  template <class T>
  __device__ void write_fours() {
    EFLAT_UNROLL
    for (int u = 0; u < kFours; ++u) {
      recompute_from(place_[u]);
      if (place_[u] == kNone) continue;
      T raw[4];
      memcpy(raw, &raw_[u], sizeof(raw));
      if (u < kFours / 2 && side_.added && row_of(place_[u]) < count_) {
        const float4 four = read_once(added_four(u));
        const float added[4] = {four.x, four.y, four.z, four.w};
        EFLAT_UNROLL
        for (int f = 0; f < 4; ++f) raw[f] = point(raw[f], added[f]);
      }
      Element x[4];
      EFLAT_UNROLL
      for (int f = 0; f < 4; ++f) x[f] = scaled(Element(to_float(raw[f])), place_[u] & kGrad);
      Element* z = z_ + (place_[u] & kSlotMask);
      if (side_.transposed) {  // four rows of one column
        const int other_half = place_[u] & kHigh ? -4 : 4;
        z[0] = x[0];
        z[8] = x[1];
        z[16 + other_half] = x[2];
        z[24 + other_half] = x[3];
      } else {
        reinterpret_cast<Two<Element>*>(z)[0] = {x[0], x[1]};
        reinterpret_cast<Two<Element>*>(z)[1] = {x[2], x[3]};
      }
    }
  }

  __device__ void write_elements() {
    const int r = chunk_.rank, rows = chunk_.rows, width = chunk_.width;
    EFLAT_ROLL
    for (int e = threadIdx.x; e < rows * width; e += kThreads) {
      const int row = side_.transposed ? e % rows : e / width;
      const int column = side_.transposed ? e / rows : e % width;
      const bool grad = column >= r;
      const int j = grad ? column - r : column;
      const int64_t k = begin_ + row;
      Element x = 0;
      if (row < count_) {
        const int64_t i = side_.transposed ? j * int64_t(side_.length) + k : k * r + j;
        x = scaled(Element(element(grad ? side_.grad : side_.factor, grad ? nullptr : side_.added,
                                   side_.dtype, i)),
                   grad);
      }
      z_[chunk_.at(row, column)] = x;
    }
  }

  __device__ Element scaled(Element x, bool grad) const {
    if constexpr (sizeof(Element) == 4) return x * (grad ? scales_.grad : scales_.factor);
    return x;
  }

  // A place in shared memory, a row of the chunk, and two flags.
  static constexpr int kRowShift = 14, kSlotMask = (1 << kRowShift) - 1, kRowMask = 1023;
  static constexpr int kGrad = 1 << 24, kHigh = 1 << 25;
  static constexpr int kNone = kRowMask << kRowShift;  // a row that no chunk has
  __device__ static int row_of(int place) { return place >> kRowShift & kRowMask; }

  const SideArgs& side_;
  const Chunk& chunk_;
  const StageScales scales_;
  Element* const z_;
  bool vectors_;
  int64_t begin_ = 0;
  int count_ = 0;
  int place_[kFours], offset_[kFours];
  uint4 raw_[kFours];
};

}  // namespace eflat::cuda
