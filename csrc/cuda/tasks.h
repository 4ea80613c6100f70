// The tables that kernels read: one entry per side, per pair and per thread block. Built on the
// host, with pointers into one device workspace.
#pragma once
#include "../pairs.h"
#include "../pseudo_inverse.h"

namespace eflat::cuda {

struct SideTask {
  Side side;
  int rank;
  DType dtype;
  double rtol;
  int blocks;
  double* partial;      // blocks x (width, width), width = 2 rank with a gradient, else rank
  double* gram;         // (width, width)
  double* inverse;      // (rank, rank)
  double* rows;         // (rank, rank)
  double* eigenvalues;  // rank
  double* basis;        // (rank, rank)
  double* work;         // 3 rank^2 + rank
  InversionState* state;
};

struct PairTask {
  int target, other;  // SideTasks
  double scaling;
  void* out;
  DType out_dtype;
  double* weights;  // (2 rank, rank)
  double* work;     // 2 rank^2
};

// A block of rows, and its number among the blocks of its side.
struct BlockTask {
  int owner;
  int index;
  int64_t begin, end;
};

struct Tables {
  const SideTask* sides;
  const PairTask* pairs;
  const BlockTask* reduce_blocks;  // owner: SideTask
  const BlockTask* apply_blocks;   // owner: PairTask
  int side_count, pair_count, reduce_count, apply_count;
  double *norms, *sizes, *scales;  // one per pair
};

// Shared memory of a thread block, in bytes; rows are staged in chunks that fit.
constexpr int kSharedBytes = 32 * 1024;
constexpr int kThreads = 256;

}  // namespace eflat::cuda
