// The division of a side's rows among threads and thread blocks.
#pragma once
#include <algorithm>
#include <vector>

#include "pairs.h"

namespace eflat {

// Rows [begin, end) of a side: the unit of parallel work. `owner` is the index of the side, or of
// the pair. Blocks depend on shapes alone, so that sums do not depend on who computes them.
struct Block {
  int owner;
  int64_t begin, end;
};

// Many enough that writing a partial Gram matrix costs little beside computing it.
inline int64_t block_rows(int rank) { return std::max(512, 16 * rank); }

inline int64_t block_count(const Side& side, int rank) {
  return (side.length + block_rows(rank) - 1) / block_rows(rank);
}

inline void append_blocks(std::vector<Block>& blocks, int owner, const Side& side, int rank) {
  const int64_t rows = block_rows(rank);
  for (int64_t begin = 0; begin < side.length; begin += rows)
    blocks.push_back({owner, begin, std::min(begin + rows, side.length)});
}

}  // namespace eflat
