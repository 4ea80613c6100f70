// Reduce, solve, apply over a list of pairs.
//
//   reduce   blocks of rows of each side → partial Gram matrices → their sum in a fixed order
//   solve    M^+ of both sides (and a second pass over a pair where one is too ill-conditioned),
//            then norm and weights
//   apply    blocks of rows of the target → E
//   step     blocks of elements of both sides → AdamW, where a pair asks for it
//
// Many pairs are handed out whole, one at a time. Few are taken in groups, small enough that apply
// finds in the cache what reduce has read, and each stage of a group is spread over the threads.
// Blocks depend on shapes alone, never on the number of threads, and so does every sum.
#include "perturb.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../core/blocks.h"

namespace eflat::cpu {
namespace {

constexpr int64_t kGroupBytes = 1 << 20;  // of what a group reads, and of partial sums
constexpr int64_t kStepBlock = 1 << 14;   // elements of a factor that AdamW takes at once

// Memory that grows and is kept, so that a training loop allocates nothing after its first step.
// Aligned to a cache line: a vector load that crosses one costs two.
double* reserve(std::vector<double>& buffer, int64_t size) {
  constexpr int64_t kLine = 64;
  if (int64_t(buffer.size()) < size + kLine) buffer.resize(size + kLine);
  void* aligned = buffer.data();
  size_t space = buffer.size() * sizeof(double);
  return static_cast<double*>(std::align(kLine, size * sizeof(double), aligned, space));
}
double* thread_scratch(int r) {
  static thread_local std::vector<double> buffer;
  return reserve(buffer, scratch_size(r));
}

// One side of one pair while its group is at work.
struct SideWork {
  const Side* side;
  const Pair* pair;
  double* partial;  // blocks x (2r, 2r)
  double* gram;     // (2r, 2r)
  double* second;   // (2r, 2r), of the second pass
  double* inverse;  // (r, r), M^+, in the basis T after a second pass
  double* R;        // (r, r)
  double* T;        // (r, r)
  bool again;       // this side is why the pair needs a second pass

  int r() const { return pair->rank; }
  int64_t blocks() const { return block_count(*side, r()); }
  static int64_t doubles(const Pair& pair, const Side& side) {
    const int64_t r = pair.rank;
    return (block_count(side, pair.rank) + 2) * 4 * r * r + 3 * r * r;
  }
};

void sum_partials(const SideWork& work, double* out) {
  const int64_t size = 4 * int64_t(work.r()) * work.r();
  std::copy_n(work.partial, size, out);
  for (int64_t b = 1; b < work.blocks(); ++b)
    for (int64_t e = 0; e < size; ++e) out[e] += work.partial[b * size + e];
}

class Perturbation {
 public:
  Perturbation(const Problem& problem, double* norms)
      : problem_(problem), norms_(norms), k_(kernels()) {
    int64_t size = 0;
    for (int l = 0; l < problem.count; ++l) size += 4 * square(problem.pairs[l].rank);
    weights_.reserve(problem.count);
    weight_storage_.resize(size);
    double* next = weight_storage_.data();
    for (int l = 0; l < problem.count; ++l) {
      weights_.push_back(next);
      next += 4 * square(problem.pairs[l].rank);
    }
    sizes_.resize(problem.count);
    scales_.resize(problem.count);
  }

  int64_t run(const ParallelFor& parallel_for, int threads) {
    if (problem_.count >= 2 * threads) {
      parallel_for(problem_.count,
                   [&](int64_t l) { solve_and_apply(int(l), int(l) + 1, serially); });
    } else {
      for (int first = 0, last; first < problem_.count; first = last) {
        last = end_of_group(first);
        solve_and_apply(first, last, parallel_for);
      }
    }
    if (problem_.global_norm) apply(0, problem_.count, parallel_for);
    return std::count_if(norms_, norms_ + problem_.count, [](double x) { return !usable(x); });
  }

 private:
  static int64_t square(int64_t r) { return r * r; }

  static void serially(int64_t count, const std::function<void(int64_t)>& body) {
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  void solve_and_apply(int first, int last, const ParallelFor& parallel_for) {
    solve(first, last, parallel_for);
    if (!problem_.global_norm) apply(first, last, parallel_for);
  }

  int end_of_group(int first) const {
    int64_t bytes = 0;
    int l = first;
    do {
      const Pair& p = problem_.pairs[l];
      for (const Side* side : {&p.target, &p.other}) {
        const int added = side->added ? size_of(added_to(p.dtype)) : 0;
        bytes += p.rank * side->length * (2 * size_of(p.dtype) + added) +
                 8 * SideWork::doubles(p, *side);
      }
    } while (++l < problem_.count && bytes < kGroupBytes);
    return l;
  }

  // Sides 2i and 2i + 1 are target and other of pair first + i.
  std::vector<SideWork> lay_out(int first, int last) {
    static thread_local std::vector<double> arena;
    int64_t size = 0;
    for (int l = first; l < last; ++l) {
      const Pair& p = problem_.pairs[l];
      size += SideWork::doubles(p, p.target) + SideWork::doubles(p, p.other);
    }
    double* next = reserve(arena, size);
    std::vector<SideWork> sides;
    for (int l = first; l < last; ++l) {
      const Pair& p = problem_.pairs[l];
      const int64_t rr = square(p.rank);
      for (const Side* side : {&p.target, &p.other}) {
        auto take = [&next](int64_t n) { return (next += n) - n; };
        SideWork w{};
        w.side = side;
        w.pair = &p;
        w.partial = take(w.blocks() * 4 * rr);
        w.gram = take(4 * rr);
        w.second = take(4 * rr);
        w.inverse = take(rr);
        w.R = take(rr);
        w.T = take(rr);
        sides.push_back(w);
      }
    }
    return sides;
  }

  void solve(int first, int last, const ParallelFor& parallel_for) {
    std::vector<SideWork> sides = lay_out(first, last);
    std::vector<Block> blocks;
    for (size_t i = 0; i < sides.size(); ++i)
      append_blocks(blocks, int(i), *sides[i].side, sides[i].r());
    parallel_for(blocks.size(), [&](int64_t i) {
      const Block& b = blocks[i];
      const SideWork& w = sides[b.owner];
      const int r = w.r();
      k_.gram(*w.side, w.pair->dtype, r, b.begin, b.end,
              w.partial + b.begin / block_rows(r) * 4 * square(r), thread_scratch(r));
    });
    parallel_for(sides.size(), [&](int64_t i) { invert(sides[i]); });
    second_pass(sides, parallel_for);
    parallel_for(last - first, [&](int64_t i) {
      const int l = first + int(i);
      const Pair& p = problem_.pairs[l];
      const int r = p.rank;
      const SideWork &t = sides[2 * i], &o = sides[2 * i + 1];
      double* work = thread_scratch(r);
      const bool again = t.again || o.again;
      const double *gram_t = again ? t.second : t.gram, *gram_o = again ? o.second : o.gram;
      if (p.other.out) {
        norms_[l] = k_.tangent_norm_and_weights(
            r, gram_t, t.inverse, gram_o, o.inverse, again ? t.T : nullptr, again ? o.T : nullptr,
            p.scaling, problem_.rho, p.target.length, problem_.norms_dtype, weights_[l],
            weights_other(l), work);
      } else {
        norms_[l] = k_.norm_and_weights(r, gram_t, t.inverse, gram_o, o.inverse, p.scaling,
                                        problem_.norms_dtype, weights_[l], work);
      }
      auto finish = [&](double* weights, const SideWork& own, const SideWork& other) {
        if (again) k_.leave_bases(r, own.T, other.T, weights, work);
        return k_.perturbation_size(r, own.gram, p.scaling, weights, norms_[l], problem_.rho,
                                    p.out_dtype);
      };
      sizes_[l] = finish(weights_[l], t, o);
      if (p.other.out) {
        const double size = finish(weights_other(l), o, t);
        if (!(size <= sizes_[l])) sizes_[l] = size;
      }
    });
  }

  void invert(SideWork& w) {
    const int r = w.r();
    sum_partials(w, w.gram);
    double* M = thread_scratch(r);
    double* work = M + square(r);
    for (int i = 0; i < r; ++i) std::copy_n(w.gram + i * 2 * r, r, M + i * r);
    w.again = k_.invert_gram(r, M, w.pair->rtol, w.pair->dtype, w.inverse, w.R, w.T, work);
  }

  // Both sides of the pairs that need it, in the bases that the first pass has found.
  void second_pass(std::vector<SideWork>& sides, const ParallelFor& parallel_for) {
    std::vector<Block> blocks;
    std::vector<int> chosen;
    for (size_t i = 0; i < sides.size(); ++i) {
      if (!sides[i].again && !sides[i ^ 1].again) continue;
      chosen.push_back(int(i));
      if (!sides[i].again) identity_bases(SerialTeam(), sides[i].r(), sides[i].R, sides[i].T);
      append_blocks(blocks, int(i), *sides[i].side, sides[i].r());
    }
    parallel_for(blocks.size(), [&](int64_t i) {
      const Block& b = blocks[i];
      const SideWork& w = sides[b.owner];
      const int r = w.r();
      k_.second_gram(*w.side, w.pair->dtype, r, w.T, sides[b.owner ^ 1].T, b.begin, b.end,
                     w.partial + b.begin / block_rows(r) * 4 * square(r), thread_scratch(r));
    });
    parallel_for(chosen.size(), [&](int64_t i) {
      SideWork& w = sides[chosen[i]];
      sum_partials(w, w.second);
      k_.correct_inverse(w.r(), w.again, w.second, w.pair->rtol, w.R, w.inverse,
                         thread_scratch(w.r()));
    });
  }

  double* weights_other(int l) { return weights_[l] + 2 * square(problem_.pairs[l].rank); }

  // The layers from `first` on, as finish_scales takes them.
  struct Layers {
    Perturbation& p;
    int first;
    double& norm(int l) { return p.norms_[first + l]; }
    double& scale(int l) { return p.scales_[first + l]; }
    double size(int l) const { return p.sizes_[first + l]; }
    double scaling(int l) const { return p.problem_.pairs[first + l].scaling; }
    DType dtype(int l) const { return p.problem_.pairs[first + l].out_dtype; }
  };

  void apply(int first, int last, const ParallelFor& parallel_for) {
    Layers layers{*this, first};
    finish_scales(SerialTeam(), layers, last - first, problem_.rho, problem_.global_norm);
    std::vector<Block> blocks;  // sides as in lay_out
    for (int l = first; l < last; ++l) {
      const Pair& p = problem_.pairs[l];
      for (int other : {0, 1}) {
        const Side& side = other ? p.other : p.target;
        if (!side.out) continue;
        if (usable(norms_[l])) {
          append_blocks(blocks, 2 * l + other, side, p.rank);
        } else if (!problem_.update.average) {
          std::memset(side.out, 0, side.length * p.rank * size_of(p.out_dtype));
        }
      }
    }
    parallel_for(blocks.size(), [&](int64_t i) {
      const Block& b = blocks[i];
      const int l = b.owner / 2;
      const Pair& p = problem_.pairs[l];
      const bool other = b.owner % 2;
      k_.apply(other ? p.other : p.target, p.dtype, p.rank, b.begin, b.end,
               other ? weights_other(l) : weights_[l], scales_[l], problem_.update, p.out_dtype,
               thread_scratch(p.rank));
    });
    step(first, last, parallel_for);
  }

  // Once E is there, nothing reads these pairs' factors and gradients any more.
  void step(int first, int last, const ParallelFor& parallel_for) {
    std::vector<Block> blocks;  // of elements, in whatever layout; sides as in lay_out
    for (int l = first; l < last; ++l) {
      const Pair& p = problem_.pairs[l];
      for (int other : {0, 1}) {
        const Side& side = other ? p.other : p.target;
        const int64_t size = side.step ? side.length * p.rank : 0;
        for (int64_t begin = 0; begin < size; begin += kStepBlock)
          blocks.push_back({2 * l + other, begin, std::min(begin + kStepBlock, size)});
      }
    }
    parallel_for(blocks.size(), [&](int64_t i) {
      const Block& b = blocks[i];
      const Pair& p = problem_.pairs[b.owner / 2];
      const Side& side = b.owner % 2 ? p.other : p.target;
      k_.adamw(*side.step, side.grad, p.dtype, b.begin, b.end);
    });
  }

  const Problem& problem_;
  double* norms_;
  const Kernels& k_;
  std::vector<double> weight_storage_;
  std::vector<double*> weights_;  // per pair, (2r, r), and (2r, r) of the other side
  std::vector<double> sizes_, scales_;
};

}  // namespace

int64_t perturb(const Problem& problem, double* norms, const ParallelFor& parallel_for,
                int threads) {
  return Perturbation(problem, norms).run(parallel_for, threads);
}

void bound(const Problem& problem, double* factors, const ParallelFor& parallel_for) {
  const Kernels& k = kernels();
  const int count = problem.count;
  // ||B E||^2 = tr(B^T B E E^T)
  parallel_for(count, [&](int64_t l) {
    const Pair& p = problem.pairs[l];
    const int r = p.rank;
    std::vector<double> gram(3 * r * r);
    double* partial = gram.data() + 2 * r * r;
    double* sum = gram.data();
    for (const Side* side : {&p.target, &p.other}) {
      const DType dtype = side == &p.target ? p.dtype : p.out_dtype;
      for (int64_t begin = 0; begin < side->length; begin += block_rows(r)) {
        const int64_t end = std::min(begin + block_rows(r), side->length);
        k.gram(*side, dtype, r, begin, end, partial, thread_scratch(r));
        for (int e = 0; e < r * r; ++e) sum[e] += partial[e];
      }
      sum += r * r;
    }
    double square = 0;
    for (int e = 0; e < r * r; ++e) square += gram[e] * gram[r * r + e];
    factors[l] = std::fabs(p.scaling) * std::sqrt(std::max(square, 0.0));
  });
  double squares = 0;
  for (int l = 0; l < count; ++l) squares += factors[l] * factors[l];
  for (int l = 0; l < count; ++l) {
    const double norm = problem.global_norm ? std::sqrt(squares) : factors[l];
    factors[l] = norm > problem.rho ? problem.rho / norm : 1.0;
  }
}

}  // namespace eflat::cpu
