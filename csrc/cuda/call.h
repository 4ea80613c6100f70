// The argument of a launch (one, so that CUDA graphs keep it), and the layout of the device
// workspace. Host and device compute the same layout from the same numbers.
#pragma once
#include "../core/pairs.h"

namespace eflat::cuda {

// Sizes of the work that one thread block does, equal for all pairs of a call.
struct BlockRows {
  int reduce, second, apply;  // rows of a side; multiples of 16
};

struct SideArgs {
  const void* factor;
  const void* grad;   // null: the factor alone
  const void* added;  // as `out`, see pairs.h
  void* out;
  int length;
  DType dtype : 8;
  bool transposed;
  bool vectors, out_vectors;  // four neighbours at a time: aligned, and none straddles a row
};

// AdamW of one factor, see pairs.h.
struct AdamWArgs {
  void* exp_avg;
  void* exp_avg_sq;
  float* step;
  int hyper;   // index into Call::hypers
  bool fours;  // four neighbours at a time
};

struct StepArgs {
  AdamWArgs target, other;
};

struct Hyper {
  double step_number, lr, beta1, beta2, eps, weight_decay;
  bool operator==(const Hyper&) const = default;
};

struct PairArgs {
  SideArgs target, other;
  double scaling, rtol;
  int rank;
  DType out_dtype : 8;
  unsigned workspace;                              // of this pair, in units of kSpaceUnit
  int reduce_before, second_before, apply_before;  // blocks of the pairs before this one
};

// a: at most 2^30. Unsigned: what divides on the device is slow, and 64 bits are twice as slow.
EFLAT_HD constexpr int ceil_div(unsigned a, unsigned b) { return int((a + b - 1) / b); }

// Gram matrices are cut into 8 x 8 tiles, four by four of them into squares. A warp's share is one
// square off the diagonal, or two on it. One block takes kWarps shares; larger matrices several.
EFLAT_HD int square_count(int width) { return ceil_div(width, 32); }
EFLAT_HD int off_diagonal_shares(int width) {
  return square_count(width) * (square_count(width) - 1) / 2;
}
EFLAT_HD int share_count(int width) {
  return off_diagonal_shares(width) + ceil_div(square_count(width), 2);
}
EFLAT_HD int share_rounds(int width) { return ceil_div(share_count(width), 8); }

EFLAT_HD int width_of(const SideArgs& side, int rank) { return side.grad ? 2 * rank : rank; }

EFLAT_HD int gram_blocks(const SideArgs& side, int rank, int rows) {
  return ceil_div(side.length, rows) * share_rounds(width_of(side, rank));
}
EFLAT_HD int gram_blocks(const PairArgs& p, int rows) {
  return gram_blocks(p.target, p.rank, rows) + gram_blocks(p.other, p.rank, rows);
}

// The r x r matrices of a pair, in the workspace.
struct PairSpace {
  double *partial_t, *partial_o;  // per block of rows (width, width), upper triangle
  double *gram_t, *gram_o;        // (width, width)
  double *second_t, *second_o;    // (2r, 2r), of the second pass
  double *inverse_t, *inverse_o;  // (r, r), M^+, in the bases T after a second pass
  double *R_t, *R_o, *T_t, *T_o;  // (r, r)
  double* M;                      // (r, r)
  double *weights_t, *packed_t;   // (2r, r), and the same as fragments, see apply.cuh
  double *bases_t, *bases_o;      // as fragments, see reduce.cuh
  double* work;                   // 2 r^2 + 2 r, for ranks whose matrices do not fit shared memory
  double *weights_o, *packed_o;   // where both factors are perturbed, as what follows
  double* tangent_work;           // 4 r^2, more than shared memory may hold
  int64_t doubles;                // of all of them

  PairSpace() = default;
  EFLAT_HD PairSpace(double* base, const PairArgs& p, int reduce_rows) {
    const int64_t r = p.rank, w = width_of(p.target, p.rank);
    const int64_t fragments = int64_t(ceil_div(2 * r, 4)) * ceil_div(r, 8) * 32;
    const int64_t base_fragments = int64_t(ceil_div(2 * r, 4)) * ceil_div(2 * r, 8) * 32;
    doubles = 0;
    auto take = [this, base](int64_t count) {
      double* p = base ? base + doubles : nullptr;
      doubles += (count + 1) / 2 * 2;
      return p;
    };
    partial_t = take(ceil_div(p.target.length, reduce_rows) * w * w);
    partial_o = take(ceil_div(p.other.length, reduce_rows) * w * w);
    gram_t = take(w * w);
    gram_o = take(w * w);
    if (!p.target.grad) return;
    second_t = take(w * w);
    second_o = take(w * w);
    inverse_t = take(r * r);
    inverse_o = take(r * r);
    R_t = take(r * r);
    R_o = take(r * r);
    T_t = take(r * r);
    T_o = take(r * r);
    M = take(r * r);
    weights_t = take(2 * r * r);
    packed_t = take(fragments);
    bases_t = take(base_fragments);
    bases_o = take(base_fragments);
    work = take(2 * r * r + 2 * r);
    if (!p.other.out) return;
    weights_o = take(2 * r * r);
    packed_o = take(fragments);
    tangent_work = take(4 * r * r);
  }
};

// The progress of a call; zero at its start.
struct Progress {
  int ticket;    // blocks that have begun
  int solved;    // pairs whose norm is known
  int finished;  // 1: all scales are known
};

struct PairProgress {
  int reduced, corrected;  // blocks that have written their partial Gram matrices
  int state;               // PairState
};

enum PairState : int { kUnsolved = 0, kSecondPass, kReady };

// A side's factor and gradient are multiplied by 2^-e as they are read, see TwoFloat.
struct Exponents {
  int factor, grad, sum;
};

// The results of a pair, for the kernels and for finish_scales.
struct PairResult {
  double norm, size, scale, scaling;
  DType dtype;
  bool again_t, again_o;  // the sides that are why the pair needed a second pass
  Exponents exponents_t, exponents_o;
};

// The workspace: Progress, PairProgress per pair, PairResult per pair, PairSpace per pair.
constexpr int64_t kProgressBytes = 16;
constexpr int64_t kSpaceUnit = 128;  // a cache line; 2^32 of them are more than any device has
EFLAT_HD int64_t cleared_bytes(int pairs) {
  return kProgressBytes + int64_t(sizeof(PairProgress)) * pairs;
}
EFLAT_HD int64_t results_at(int pairs) { return (cleared_bytes(pairs) + 15) / 16 * 16; }
EFLAT_HD int64_t spaces_at(int pairs) {
  const int64_t end = results_at(pairs) + int64_t(sizeof(PairResult)) * pairs;
  return (end + kSpaceUnit - 1) / kSpaceUnit * kSpaceUnit;
}

constexpr int kHypers = 64;  // in a launch: layers may have learning rates of their own

// Kernel arguments may take 32,764 bytes; longer lists are split.
struct CallHeader {
  char* workspace;
  void* norms;  // or the factors of bound
  unsigned long long* skipped;
  double rho, beta;
  int first, count;           // pairs of this launch
  int total;                  // pairs of the call
  int second_lag, apply_lag;  // pairs by which these stages follow reduce
  int tickets_before;         // of earlier launches
  BlockRows rows;
  bool average, global_norm;
  bool sums_in_float64;                // of all pairs: a float64 pair shares their norm
  bool bound;                          // pairs of bare factors, for foreach_bound
  bool reduces, second_pass, applies;  // the stages of this launch
  DType norms_dtype;
};

template <int kPairs, int kSteps>
struct CallOf : CallHeader {
  Hyper hypers[kSteps ? kHypers : 1];
  StepArgs steps[kSteps ? kSteps : 1];
  PairArgs pairs[kPairs];
};
using Call = CallOf<270, 0>;
using StepCall = CallOf<160, 160>;
static_assert(sizeof(Call) <= 32764 && sizeof(StepCall) <= 32764);

}  // namespace eflat::cuda
