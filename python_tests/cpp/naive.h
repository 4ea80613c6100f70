// Launches the naive kernels; the host's part of them is as plain.
#pragma once
#include <algorithm>
#include <vector>

#include "../../csrc/cuda/naive.cuh"

namespace eflat::cuda::naive {

// Does what cuda::perturb does, pair by pair. norms: `count` values in float64.
inline void perturb(const Problem& problem, double* norms, int64_t* skipped) {
  std::vector<std::vector<double>> memory;
  std::vector<Space> spaces;
  auto take = [&memory](size_t count) { return memory.emplace_back(count, NAN).data(); };
  std::vector<char> again(2 * problem.count);
  for (int l = 0; l < problem.count; ++l) {
    const Pair& p = problem.pairs[l];
    const size_t rr = size_t(p.rank) * p.rank;
    Space s{};
    for (int side = 0; side < 2; ++side) {
      for (double** x : {&s.gram[side], &s.second[side]}) *x = take(4 * rr);
      for (double** x : {&s.inverse[side], &s.R[side], &s.T[side]}) *x = take(rr);
    }
    s.M = take(rr);
    s.weights[0] = take(2 * rr);
    s.weights[1] = take(2 * rr);
    s.work = take(4 * rr + 2 * p.rank);
    s.again = reinterpret_cast<bool*>(&again[2 * l]);
    s.norm = norms + l;
    s.size = take(1);
    s.scale = take(1);
    spaces.push_back(s);
    EFLAT_LAUNCH(gram_kernel, 1, kThreads, 0, nullptr, p.target, p.dtype, p.rank, s.gram[0]);
    EFLAT_LAUNCH(gram_kernel, 1, kThreads, 0, nullptr, p.other, p.dtype, p.rank, s.gram[1]);
    EFLAT_LAUNCH(invert_kernel, 1, 1, 0, nullptr, p, s);
    if (s.again[0] || s.again[1]) {
      EFLAT_LAUNCH(second_gram_kernel, 1, kThreads, 0, nullptr, p.target, p.dtype, p.rank, s.T[0],
                   s.T[1], s.second[0]);
      EFLAT_LAUNCH(second_gram_kernel, 1, kThreads, 0, nullptr, p.other, p.dtype, p.rank, s.T[1],
                   s.T[0], s.second[1]);
    }
    EFLAT_LAUNCH(weights_kernel, 1, 1, 0, nullptr, p, s, problem.rho, problem.norms_dtype);
  }
  const int together = problem.global_norm ? problem.count : 1;
  for (int l = 0; l < problem.count; l += together) {
    Layers layers{problem.pairs + l, spaces.data() + l};
    finish_scales(SerialTeam(), layers, together, problem.rho, problem.global_norm);
  }
  for (int l = 0; l < problem.count; ++l) {
    const Pair& p = problem.pairs[l];
    EFLAT_LAUNCH(apply_kernel, 1, kThreads, 0, nullptr, p, spaces[l], problem.update, false);
    if (p.other.out)
      EFLAT_LAUNCH(apply_kernel, 1, kThreads, 0, nullptr, p, spaces[l], problem.update, true);
    if (skipped) *skipped += !usable(norms[l]);
  }
}

}  // namespace eflat::cuda::naive
