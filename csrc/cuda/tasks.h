// The tables that kernels read: one entry per side, per pair and per thread block. Built on the
// host, with pointers into one device workspace.
#pragma once
#include "../pairs.h"

namespace eflat::cuda {

struct SideTask {
  Side side;
  int rank;
  DType dtype;
  double rtol;
  int blocks;
  int partner;          // the pair's other SideTask
  double* partial;      // blocks x (width, width), width = 2 rank with a gradient, else rank
  double* gram;         // (width, width)
  double* second;       // (width, width), of the second pass
  double* inverse;      // (rank, rank), M^+, in the basis T after a second pass
  double* R;            // (rank, rank)
  double* T;            // (rank, rank)
  double* eigenvalues;  // rank
  double* work;         // 3 rank^2 + 2 rank
  bool* again;          // this side is why the pair needs a second pass
};

struct PairTask {
  int target, other;  // SideTasks
  double scaling;
  void* out;
  DType out_dtype;
  double* weights;  // (2 rank, rank)
  double* work;     // rank^2
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
