// Stage 2: pseudo-inverses, norms and coefficients of a pair, by the block that wrote the last of
// its Gram matrices' partial sums.
//
// Bytes: the partial sums, and a dozen r x r matrices that stay in the L1 cache. Flops: about 10
// r^3 multiply-adds, nothing beside the other stages; a chain of r dependent steps per
// factorisation bounds it. Block: one warp per row of a matrix; what is eliminated or rotated lies
// in shared memory up to rank kSharedRank, in the workspace beyond.
#pragma once
#include "adamw.cuh"
#include "reduce.cuh"

namespace eflat::cuda {

constexpr int kSharedRank = 64;

enum class Stages { kReduce, kSecond, kApply };

struct Task {
  Stages stage;
  int pair;
  int index;  // of the block among those of the pair and stage
};

// A block's work, written by one thread. In shared memory, before that of the stages, it takes no
// registers where it is not needed.
struct Block {
  const CallHeader* call;
  const StepArgs* step;  // of the pair; null: none
  const Hyper* hypers;
  Progress* progress;
  PairProgress* pair_progress;
  PairResult* results;  // of all pairs
  PairResult* result;
  Task task;
  int pair_number;  // in the whole call
  PairArgs pair;
  SideArgs side;   // the one that this block reads
  bool on_target;  // whether it is the target
  Chunk chunk;
  int64_t begin, end;  // rows of it
  bool two_float;      // the arithmetic
  int round;           // of the Gram matrix's shares
  double* partial;     // where its Gram matrix goes
  PairSpace space;
  FactorNumbers adamw;
  double scratch[kWarps];
  int flag;
};
constexpr int kBlockBytes = (sizeof(Block) + 15) / 16 * 16;

// All threads of the block are done with what they write, and the block is counted. Whether it was
// the last of `total`; then what the others wrote can be read.
__device__ inline bool last_to_arrive(int* arrived, int total, Block& block) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    block.flag = atomicAdd(arrived, 1) == total - 1;
    __threadfence();
  }
  __syncthreads();
  return block.flag;
}

// Makes the block's writes visible to blocks that see `state` here.
__device__ inline void publish(int* state, int value) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicExch(state, value);
  }
}

// Waits until an earlier block publishes; returns what.
__device__ inline int await(int* state, int at_least, Block& block) {
  if (threadIdx.x == 0) {
    int value;
    while ((value = read_flag(state)) < at_least) __nanosleep(100);
    __threadfence();
    block.flag = value;
  }
  __syncthreads();
  return block.flag;
}

// gram (width, width), symmetric, = sum of the partial ones in order.
__device__ inline void sum_partials(const double* partial, int blocks, int width, double* gram) {
  const int64_t size = int64_t(width) * width;
  for (int i = warp(); i < width; i += kWarps) {
    for (int j = i + lane(); j < width; j += 32) {
      double sum = 0;
      for (int b = 0; b < blocks; ++b) sum += partial[b * size + i * width + j];
      gram[i * width + j] = gram[j * width + i] = sum;
    }
  }
  __syncthreads();
}

// values[l] = x, values of float64 or float32.
__device__ inline void report(void* values, DType dtype, int l, double x) {
  if (dtype == DType::f64) {
    static_cast<double*>(values)[l] = x;
  } else {
    static_cast<float*>(values)[l] = float(x);
  }
}

struct ResultLayers {  // what finish_scales asks
  PairResult* results;
  __device__ double& norm(int l) { return results[l].norm; }
  __device__ double& scale(int l) { return results[l].scale; }
  __device__ double size(int l) const { return results[l].size; }
  __device__ double scaling(int l) const { return results[l].scaling; }
  __device__ DType dtype(int l) const { return results[l].dtype; }
};

// Scales of `count` pairs from `first` on: a few flops per pair, in a fixed order.
template <class Team>
__device__ void finish(const Team& team, const CallHeader& call, PairResult* results, int first,
                       int count) {
  ResultLayers layers{results + first};
  finish_scales(team, layers, count, call.rho, call.global_norm);
  unsigned long long skipped = 0;
  for (int l = first + thread_of(team); l < first + count; l += threads_of(team)) {
    report(call.norms, call.norms_dtype, l, results[l].norm);
    skipped += !usable(results[l].norm);
  }
  if (call.skipped && skipped) atomicAdd(call.skipped, skipped);
}

// The exponent of a magnitude, within limits; a small one for zero.
__device__ inline int exponent_of(double x, int limit) {
  const int exponent = x > 0 ? ilogb(x) : -limit;
  return exponent < -limit ? -limit : exponent > limit ? limit : exponent;
}

// For a side whose weights are known: powers of two for its factor and gradient and for the larger
// of their products with the weights.
EFLAT_NOINLINE void set_exponents(Block& block, const double* gram, const double* weights,
                                  Exponents& exponents) {
  const BlockTeam team{block.scratch};
  const int r = block.pair.rank;
  const double of_Q = sqrt(dot(team, r * r, weights, weights));
  const double of_P = sqrt(dot(team, r * r, weights + r * r, weights + r * r));
  if (threadIdx.x != 0) return;
  double of_factor = 0, of_grad = 0;
  for (int i = 0; i < r; ++i) {
    of_factor += gram[i * 2 * r + i];
    of_grad += gram[(r + i) * 2 * r + r + i];
  }
  exponents.factor = exponent_of(sqrt(of_factor), 120);
  exponents.grad = exponent_of(sqrt(of_grad), 120);
  const int of_first = exponents.factor + exponent_of(of_Q, 1000);
  const int of_second = exponents.grad + exponent_of(of_P, 1000);
  exponents.sum = of_first > of_second ? of_first : of_second;
}

// Weights (2r, r) as fragments: entry (k, j), zeros beyond, at lane 4 (j % 8) + k % 4 of fragment
// (k / 4, j / 8). With the scales of TwoFloat all products are at most about 1.
__device__ inline void pack_weights(int r, const double* weights, const Exponents& exponents,
                                    double* packed) {
  const int tiles = ceil_div(r, 8), steps = ceil_div(2 * r, 4);
  const double of_factor = ldexp(1.0, exponents.factor - exponents.sum);
  const double of_grad = ldexp(1.0, exponents.grad - exponents.sum);
  EFLAT_ROLL
  for (int e = threadIdx.x; e < steps * tiles * 32; e += kThreads) {
    const int k = e / 32 / tiles * 4 + e % 4, j = e / 32 % tiles * 8 + e % 32 / 4;
    packed[e] = k < 2 * r && j < r ? weights[k * r + j] * (k < r ? of_factor : of_grad) : 0.0;
  }
}

// The norm of a pair whose pseudo-inverses are known, and its weights.
EFLAT_NOINLINE void finish_pair(Block& block, bool again, double* work) {
  const CallHeader& call = *block.call;
  const PairArgs& p = block.pair;
  const PairSpace& s = block.space;
  const BlockTeam team{block.scratch};
  const int r = p.rank;
  PairResult& result = *block.result;
  const double* gram_t = again ? s.second_t : s.gram_t;
  const double* gram_o = again ? s.second_o : s.gram_o;
  double norm, size = 0;
  if (p.other.out) {
    norm = tangent_norm_and_weights(team, r, gram_t, s.inverse_t, gram_o, s.inverse_o,
                                    again ? s.T_t : nullptr, again ? s.T_o : nullptr, p.scaling,
                                    call.rho, p.target.length, call.norms_dtype, s.weights_t,
                                    s.weights_o, s.tangent_work);
  } else {
    norm = norm_and_weights(team, r, gram_t, s.inverse_t, gram_o, s.inverse_o, p.scaling,
                            call.norms_dtype, s.weights_t, work);
  }
  EFLAT_ROLL
  for (int side = 0; side < (p.other.out ? 2 : 1); ++side) {
    double* weights = side ? s.weights_o : s.weights_t;
    const double* gram = side ? s.gram_o : s.gram_t;
    Exponents& exponents = side ? result.exponents_o : result.exponents_t;
    if (again) leave_bases(team, r, side ? s.T_o : s.T_t, side ? s.T_t : s.T_o, weights, work);
    const double more =
        perturbation_size(team, r, gram, p.scaling, weights, norm, call.rho, p.out_dtype) - size;
    size += more < 0 ? 0 : more;  // the larger of the two; NaN if one is
    if (threadIdx.x == 0) exponents = {0, 0, 0};
    if (block.two_float && !again && p.target.dtype != DType::f64)
      set_exponents(block, gram, weights, exponents);
    __syncthreads();
    pack_weights(r, weights, exponents, side ? s.packed_o : s.packed_t);
  }
  if (threadIdx.x == 0) {
    result.norm = norm;
    result.size = size;
    result.scaling = p.scaling;
    result.dtype = p.out_dtype;
    if (!call.global_norm) finish(SerialTeam(), call, block.results, block.pair_number, 1);
    if (block.step)
      for (float* step : {block.step->target.step, block.step->other.step})
        if (step) *step += 1;
  }
  if (call.global_norm && last_to_arrive(&block.progress->solved, call.total, block)) {
    finish(team, call, block.results, 0, call.total);
    publish(&block.progress->finished, 1);
  }
  publish(&block.pair_progress->state, kReady);
}

// The norm of a pair of bare factors, for foreach_bound: |s| ||B E_A||, from
// ||B E_A||^2 = tr(B^T B E_A E_A^T); the last pair's block turns them into factors.
EFLAT_NOINLINE void bound_pair(Block& block) {
  const CallHeader& call = *block.call;
  const int r = block.pair.rank;
  const BlockTeam team{block.scratch};
  const double square = dot(team, r * r, block.space.gram_t, block.space.gram_o);
  if (threadIdx.x == 0)
    block.result->norm = fabs(block.pair.scaling) * sqrt(square > 0 ? square : 0.0);
  if (!last_to_arrive(&block.progress->solved, call.total, block)) return;
  const PairResult* results = block.results;
  double squares = 0;
  for (int i = threadIdx.x; i < call.total; i += kThreads)
    squares += results[i].norm * results[i].norm;
  squares = team.total(squares);
  for (int i = threadIdx.x; i < call.total; i += kThreads) {
    const double norm = call.global_norm ? sqrt(squares) : results[i].norm;
    report(call.norms, call.norms_dtype, i, norm > call.rho ? call.rho / norm : 1.0);
  }
}

// M^+ of a side after the first pass; returns whether a second is needed. After the second: what it
// corrects.
EFLAT_NOINLINE bool solve_side(Block& block, int side, double* work) {
  const CallHeader& call = *block.call;
  const PairArgs& p = block.pair;
  const PairSpace& s = block.space;
  const BlockTeam team{block.scratch};
  const bool second = block.task.stage == Stages::kSecond;
  const int r = p.rank, width = width_of(p.target, r);
  const int rows = second ? call.rows.second : call.rows.reduce;
  const double* partial = side ? s.partial_o : s.partial_t;
  double* inverse = side ? s.inverse_o : s.inverse_t;
  double* R = side ? s.R_o : s.R_t;
  double* T = side ? s.T_o : s.T_t;
  bool& again = side ? block.result->again_o : block.result->again_t;
  double* gram = second ? (side ? s.second_o : s.second_t) : side ? s.gram_o : s.gram_t;
  sum_partials(partial, ceil_div((side ? p.other : p.target).length, rows), width, gram);
  if (call.bound) return false;
  if (second) {
    correct_inverse(team, r, again, gram, p.rtol, R, inverse, work);
    return false;
  }
  EFLAT_ROLL
  for (int e = threadIdx.x; e < r * r; e += kThreads) s.M[e] = gram[e / r * 2 * r + e % r];
  __syncthreads();
  const bool bad = invert_gram(team, r, s.M, p.rtol, p.target.dtype, inverse, R, T, work);
  if (!bad) identity_bases(team, r, R, T);
  if (threadIdx.x == 0) again = bad;
  return bad;
}

// After the first pass: M^+ of both sides; then all the rest, or the bases of a second pass.
// After the second: what it corrects, and the rest.
EFLAT_NOINLINE void solve(Block& block, void* space) {
  const PairSpace& s = block.space;
  const bool second = block.task.stage == Stages::kSecond;
  const int r = block.pair.rank;
  double* work = r <= kSharedRank ? static_cast<double*>(space) : s.work;
  bool again = false;
  EFLAT_ROLL
  for (int side = 0; side < 2; ++side) again = solve_side(block, side, work) || again;
  if (block.call->bound) return bound_pair(block);
  if (second || !again) return finish_pair(block, second, work);
  pack_bases(r, s.T_t, s.T_o, s.bases_t);
  pack_bases(r, s.T_o, s.T_t, s.bases_o);
  publish(&block.pair_progress->state, kSecondPass);
}

}  // namespace eflat::cuda
