// Tells kernels what to do: arguments, sizes of blocks, and launches.
#include <algorithm>
#include <climits>
#include <memory>
#include <type_traits>

#include "launch.h"
#include "perturb.cuh"

namespace eflat::cuda {
namespace {

constexpr int kEnoughBlocks = 1056;  // eight for each SM of a large card
// Read between a pair's reduce and its second pass, and until apply: time to solve, not more than
// L2 holds beside what is being read.
constexpr int64_t kSecondLagBytes = 16 << 20, kApplyLagBytes = 18 << 20;
constexpr int kDefaultSharedBytes = 48 * 1024;

bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

SideArgs side_args(const Side& side, int rank, DType dtype, DType out_dtype) {
  const int four = 4 * size_of(dtype);
  const bool whole = (side.transposed ? side.length : rank) % 4 == 0;
  SideArgs args{};
  args.factor = side.factor;
  args.grad = side.grad;
  args.added = side.added;
  args.out = side.out;
  args.length = int(side.length);
  args.dtype = dtype;
  args.transposed = side.transposed;
  args.vectors = whole && side.length * rank < INT_MAX && aligned(side.factor, four) &&
                 aligned(side.grad, four) && aligned(side.added, 4 * size_of(added_to(dtype)));
  args.out_vectors = whole && aligned(side.out, std::min(4 * size_of(out_dtype), 16));
  return args;
}

PairArgs pair_args(const Pair& p) {
  PairArgs args{};
  args.target = side_args(p.target, p.rank, p.dtype, p.out_dtype);
  // A bare factor (of foreach_bound) has the type of the moving average.
  args.other = side_args(p.other, p.rank, p.other.grad ? p.dtype : p.out_dtype, p.out_dtype);
  args.scaling = p.scaling;
  args.rtol = p.rtol;
  args.rank = p.rank;
  args.out_dtype = p.out_dtype;
  return args;
}

// Few rows where that is needed to fill the machine; else many, but not so many that the blocks
// under way hold more than L2 does. More for large ranks, whose partial sums are larger.
BlockRows block_rows(const Problem& problem) {
  int64_t total = 0;
  int rank = 1;
  for (int l = 0; l < problem.count; ++l) {
    total += problem.pairs[l].target.length + problem.pairs[l].other.length;
    rank = std::max(rank, problem.pairs[l].rank);
  }
  int rows = rank <= 16 ? 512 : rank <= 32 ? 1024 : 2048;
  while (rows > 128 && total / rows < kEnoughBlocks) rows /= 2;
  return {rows, 2 * rows, std::min(rows, 512)};
}

// The number of pairs that read so many bytes.
int lag_of(const Problem& problem, int64_t lag_bytes) {
  int64_t bytes = 0;
  for (int l = 0; l < problem.count; ++l) {
    const Pair& p = problem.pairs[l];
    bytes += 2 * (p.target.length + p.other.length) * p.rank * size_of(p.dtype);
  }
  return int(std::clamp<int64_t>(lag_bytes * problem.count / bytes, 1, problem.count));
}

// Dynamic shared memory of a block for a pair of this rank.
constexpr int64_t shared_bytes(int rank, int width) {
  int64_t doubles =
      std::max(stage_doubles(Chunk(rank, width, false)), stage_doubles(Chunk(rank, width, true)));
  if (rank <= kSharedRank) {
    const int64_t weights = int64_t(ceil_div(2 * rank, 4)) * ceil_div(rank, 8) * 32;
    doubles = std::max<int64_t>(doubles + weights, 2 * rank * (rank + 1));
  }
  return kBlockBytes + doubles * int64_t(sizeof(double));
}
// Used by bench/kernels/kernel_table.py: at the largest ranks that the kernels are made for.
constexpr int kSharedBytesSmall = 42112;
constexpr int kSharedBytesWide = 101120;
static_assert(shared_bytes(16, 32) == kSharedBytesSmall &&
              shared_bytes(64, 128) == kSharedBytesWide);

template <class Kernel, class Arguments>
cudaError_t launch(Kernel kernel, int blocks, int64_t shared, cudaStream_t stream,
                   const Arguments& arguments) {
  if (shared > kDefaultSharedBytes) {
    // All that the device allows, so that no other thread's call takes back what this one needs.
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  (void)stream;  // of no concern to a launch on the host
  EFLAT_LAUNCH(kernel, blocks, kThreads, shared, stream, arguments);
  return cudaGetLastError();
}

template <class Math, class CallType>
cudaError_t launch_with(const CallType& call, bool wide, int blocks, int64_t shared,
                        cudaStream_t stream) {
  if constexpr (std::is_same_v<CallType, StepCall>)
    return launch(wide ? step_kernel<Math, true> : step_kernel<Math, false>, blocks, shared, stream,
                  call);
  else
    return launch(wide ? perturb_kernel<Math, true> : perturb_kernel<Math, false>, blocks, shared,
                  stream, call);
}

template <class CallType>
cudaError_t launch(const CallType& call, bool wide, Arithmetic arithmetic, int blocks,
                   int64_t shared, cudaStream_t stream) {
#if defined(EFLAT_HOST_CUDA)
  if (arithmetic == Arithmetic::two_float)
    return launch_with<TwoFloat>(call, wide, blocks, shared, stream);
  return launch_with<Float64>(call, wide, blocks, shared, stream);
#else
  if (arithmetic != Arithmetic::native) return cudaErrorInvalidValue;
  return launch_with<Native>(call, wide, blocks, shared, stream);
#endif
}

AdamWArgs adamw_args(const AdamW& a, int hyper, const SideArgs& side, int rank) {
  const int four = std::min(4 * size_of(side.dtype), 16);
  // The ends of runs of neighbours, see step_rows.
  bool fours = (side.transposed ? side.length : int64_t(side.length) * rank) % 4 == 0;
  const void* all[] = {a.exp_avg, a.exp_avg_sq, side.factor, side.grad};
  for (const void* x : all) fours = fours && aligned(x, four);
  return {a.exp_avg, a.exp_avg_sq, a.step, hyper, fours};
}

Hyper hyper_of(const AdamW& a) {
  return {a.step ? 0.0 : a.step_number, a.lr, a.beta1, a.beta2, a.eps, a.weight_decay};
}

// The arguments of one launch, filled pair by pair.
template <class CallType>
class Launch {
 public:
  static constexpr int kPairs = sizeof(CallType::pairs) / sizeof(PairArgs);
  static constexpr bool kStep = sizeof(CallType::steps) > sizeof(StepArgs);

  explicit Launch(const CallHeader& header) : call_(std::make_unique<CallType>()) {
    static_cast<CallHeader&>(*call_) = header;
    clear(0);
  }

  void clear(int first) {
    call_->first = first;
    call_->count = hypers_ = 0;
    reduce_ = second_ = apply_ = 0;
    shared_ = 0;
    wide_ = false;
  }

  // False, and nothing added, when the launch is full.
  bool add(const Pair& pair, int64_t workspace) {
    CallType& c = *call_;
    if (c.count == kPairs) return false;
    if constexpr (kStep) {
      const int before = hypers_;
      const AdamW &of_target = *pair.target.step, &of_other = *pair.other.step;
      const int target = find(hyper_of(of_target)), other = find(hyper_of(of_other));
      if (target < 0 || other < 0) {
        hypers_ = before;
        return false;
      }
      const PairArgs p = pair_args(pair);
      c.steps[c.count] = {adamw_args(of_target, target, p.target, p.rank),
                          adamw_args(of_other, other, p.other, p.rank)};
    }
    PairArgs& p = c.pairs[c.count++] = pair_args(pair);
    p.workspace = unsigned(workspace / kSpaceUnit);
    p.reduce_before = reduce_;
    p.second_before = second_;
    p.apply_before = apply_;
    reduce_ += gram_blocks(p, c.rows.reduce);
    second_ += gram_blocks(p, c.rows.second);
    apply_ += BlocksBefore{c, c.pairs, kStep}.apply_blocks(p);
    shared_ = std::max(shared_, shared_bytes(p.rank, width_of(p.target, p.rank)));
    wide_ = wide_ || square_count(width_of(p.target, p.rank)) > 1;
    return true;
  }

  // tickets: of the launches before; those of this one are added.
  cudaError_t run(Arithmetic arithmetic, cudaStream_t stream, int& tickets) {
    CallType& c = *call_;
    const BlocksBefore before{c, c.pairs, kStep};
    const int blocks = before.before_turn(before.turns());
    c.tickets_before = tickets;
    tickets += blocks;
    return launch(c, wide_, arithmetic, blocks, shared_, stream);
  }

 private:
  int find(const Hyper& hyper) {
    for (int i = hypers_ - 1; i >= 0; --i)  // the latest is the likeliest
      if (call_->hypers[i] == hyper) return i;
    if (hypers_ == kHypers) return -1;
    call_->hypers[hypers_] = hyper;
    return hypers_++;
  }

  std::unique_ptr<CallType> call_;
  int hypers_, reduce_, second_, apply_;
  int64_t shared_;
  bool wide_;
};

// Calls body with the place of each pair's workspace; returns the end of the last.
template <class Body>
int64_t lay_out(const Problem& problem, const BlockRows& rows, Body body) {
  int64_t at = spaces_at(problem.count);
  for (int l = 0; l < problem.count; ++l) {
    body(l, at);
    const PairSpace space(nullptr, pair_args(problem.pairs[l]), rows.reduce);
    at += (space.doubles * int64_t(sizeof(double)) + kSpaceUnit - 1) / kSpaceUnit * kSpaceUnit;
  }
  return at;
}

template <class CallType>
cudaError_t launch_all(const Problem& problem, const CallHeader& header, Arithmetic arithmetic,
                       cudaStream_t stream, int& tickets) {
  cudaError_t error = cudaSuccess;
  Launch<CallType> launch(header);
  lay_out(problem, header.rows, [&](int l, int64_t at) {
    if (error != cudaSuccess || launch.add(problem.pairs[l], at)) return;
    error = launch.run(arithmetic, stream, tickets);
    launch.clear(l);
    launch.add(problem.pairs[l], at);
  });
  return error == cudaSuccess ? launch.run(arithmetic, stream, tickets) : error;
}

CallHeader header_of(const Problem& problem, void* workspace, void* norms) {
  CallHeader header{};
  header.workspace = static_cast<char*>(workspace);
  header.norms = norms;
  header.norms_dtype = problem.norms_dtype;
  header.rho = problem.rho;
  header.beta = problem.update.beta;
  header.average = problem.update.average;
  header.global_norm = problem.global_norm;
  header.sums_in_float64 =
      problem.global_norm && std::any_of(problem.pairs, problem.pairs + problem.count,
                                         [](const Pair& p) { return p.dtype == DType::f64; });
  header.total = problem.count;
  header.rows = block_rows(problem);
  header.reduces = true;
  return header;
}

cudaError_t check_and_clear(const Problem& problem, void* workspace, cudaStream_t stream) {
  for (int l = 0; l < problem.count; ++l) {
    const Pair& p = problem.pairs[l];
    if (std::max(p.target.length, p.other.length) > (1 << 30)) return cudaErrorInvalidValue;
  }
  return cudaMemsetAsync(workspace, 0, cleared_bytes(problem.count), stream);
}

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  return lay_out(problem, block_rows(problem), [](int, int64_t) {});
}

cudaError_t perturb(const Problem& problem, void* workspace, void* norms, int64_t* skipped,
                    cudaStream_t stream, Arithmetic arithmetic) {
  cudaError_t error = check_and_clear(problem, workspace, stream);
  if (error != cudaSuccess) return error;
  CallHeader header = header_of(problem, workspace, norms);
  header.skipped = reinterpret_cast<unsigned long long*>(skipped);
  header.second_lag = lag_of(problem, kSecondLagBytes);
  // One norm for all: no pair can be applied before the last is reduced.
  header.apply_lag =
      problem.global_norm ? problem.count + header.second_lag : lag_of(problem, kApplyLagBytes);
  const bool step = problem.pairs[0].target.step;
  const bool one_launch = problem.count <= (step ? Launch<StepCall>::kPairs : Launch<Call>::kPairs);
  int tickets = 0;
  auto run = [&](bool reduces, bool applies) {
    header.reduces = header.second_pass = reduces;
    header.applies = applies;
    return step ? launch_all<StepCall>(problem, header, arithmetic, stream, tickets)
                : launch_all<Call>(problem, header, arithmetic, stream, tickets);
  };
  if (!problem.global_norm || (one_launch && !step)) return run(true, true);
  error = run(true, false);
  return error == cudaSuccess ? run(false, true) : error;
}

cudaError_t bound(const Problem& problem, void* workspace, void* factors, cudaStream_t stream,
                  Arithmetic arithmetic) {
  const cudaError_t error = check_and_clear(problem, workspace, stream);
  if (error != cudaSuccess) return error;
  int tickets = 0;
  CallHeader header = header_of(problem, workspace, factors);
  header.bound = true;
  return launch_all<Call>(problem, header, arithmetic, stream, tickets);
}

}  // namespace eflat::cuda
