// Builds the tables of a call and enqueues its kernels.
#include "../blocks.h"
#include "apply.cuh"
#include "launch.h"
#include "reduce.cuh"
#include "solve.cuh"

namespace eflat::cuda {
namespace {

// Hands out pieces of the workspace; without memory, only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct HostTables {
  std::vector<SideTask> sides;
  std::vector<PairTask> pairs;
  std::vector<BlockTask> reduce_blocks, apply_blocks;
  Tables device;

  HostTables(const Problem& problem, Arena& arena) {
    for (int l = 0; l < problem.count; ++l) {
      const Pair& p = problem.pairs[l];
      const int64_t rr = int64_t(p.rank) * p.rank;
      pairs.push_back({2 * l, 2 * l + 1, p.scaling, p.out, p.out_dtype, arena.take<double>(2 * rr),
                       arena.take<double>(rr)});
      add_side(p.target, p, p.dtype, arena);
      // A bare factor (of foreach_bound) has the type of the moving average.
      add_side(p.other, p, p.other.grad ? p.dtype : p.out_dtype, arena);
      add_blocks(apply_blocks, l, p.target, p.rank);
    }
    device.sides = arena.take<SideTask>(sides.size());
    device.pairs = arena.take<PairTask>(pairs.size());
    device.reduce_blocks = arena.take<BlockTask>(reduce_blocks.size());
    device.apply_blocks = arena.take<BlockTask>(apply_blocks.size());
    device.side_count = int(sides.size());
    device.pair_count = int(pairs.size());
    device.reduce_count = int(reduce_blocks.size());
    device.apply_count = int(apply_blocks.size());
    device.norms = arena.take<double>(pairs.size());
    device.sizes = arena.take<double>(pairs.size());
    device.scales = arena.take<double>(pairs.size());
  }

  cudaError_t copy_to_device(cudaStream_t stream) const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing(stream, &status);
    if (error == cudaSuccess && status != cudaStreamCaptureStatusNone)
      error = cudaErrorStreamCaptureUnsupported;
    if (error == cudaSuccess) error = copy(device.sides, sides, stream);
    if (error == cudaSuccess) error = copy(device.pairs, pairs, stream);
    if (error == cudaSuccess) error = copy(device.reduce_blocks, reduce_blocks, stream);
    if (error == cudaSuccess) error = copy(device.apply_blocks, apply_blocks, stream);
    return error;
  }

 private:
  // From pageable memory: staged before the call returns, which may wait for the stream. A capture
  // would read the vectors when it is replayed, after they are gone.
  template <class T>
  static cudaError_t copy(const T* to, const std::vector<T>& from, cudaStream_t stream) {
    return cudaMemcpyAsync(const_cast<T*>(to), from.data(), from.size() * sizeof(T),
                           cudaMemcpyHostToDevice, stream);
  }

  static void add_blocks(std::vector<BlockTask>& out, int owner, const Side& side, int rank) {
    std::vector<Block> blocks;
    append_blocks(blocks, owner, side, rank);
    for (size_t i = 0; i < blocks.size(); ++i)
      out.push_back({owner, int(i), blocks[i].begin, blocks[i].end});
  }

  void add_side(const Side& side, const Pair& p, DType dtype, Arena& arena) {
    const int64_t r = p.rank, rr = r * r, blocks = block_count(side, p.rank);
    add_blocks(reduce_blocks, int(sides.size()), side, p.rank);
    const int index = int(sides.size());
    SideTask task{};
    task.side = side;
    task.rank = p.rank;
    task.dtype = dtype;
    task.rtol = p.rtol;
    task.blocks = int(blocks);
    task.partner = index ^ 1;
    task.partial = arena.take<double>(blocks * 4 * rr);
    task.gram = arena.take<double>(4 * rr);
    task.second = arena.take<double>(4 * rr);
    task.inverse = arena.take<double>(rr);
    task.R = arena.take<double>(rr);
    task.T = arena.take<double>(rr);
    task.eigenvalues = arena.take<double>(r);
    task.work = arena.take<double>(3 * rr + 2 * r);
    task.again = arena.take<bool>(1);
    sides.push_back(task);
  }
};

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  Arena arena(nullptr);
  HostTables(problem, arena);
  return arena.used();
}

cudaError_t perturb(const Problem& problem, void* workspace, void* norms, int64_t* skipped,
                    cudaStream_t stream) {
  for (int l = 0; l < problem.count; ++l)
    if (problem.pairs[l].step) return cudaErrorNotSupported;
  Arena arena(workspace);
  const HostTables tables(problem, arena);
  const Tables& t = tables.device;
  const cudaError_t error = tables.copy_to_device(stream);
  if (error != cudaSuccess) return error;
  EFLAT_LAUNCH(reduce_kernel, t.reduce_count, kThreads, kSharedBytes, stream, t);
  EFLAT_LAUNCH(invert_kernel, t.side_count, 32, 0, stream, t);
  EFLAT_LAUNCH(second_reduce_kernel, t.reduce_count, kThreads, kSharedBytes, stream, t);
  EFLAT_LAUNCH(correct_kernel, t.side_count, 32, 0, stream, t);
  EFLAT_LAUNCH(weights_kernel, t.pair_count, 32, 0, stream, t, problem.rho, problem.norms_dtype);
  EFLAT_LAUNCH(scales_kernel, 1, 1, 0, stream, t, problem.rho, problem.global_norm, norms,
               problem.norms_dtype, skipped);
  EFLAT_LAUNCH(apply_kernel, t.apply_count, kThreads, kSharedBytes, stream, t, problem.update);
  return cudaGetLastError();
}

cudaError_t bound(const Problem& problem, void* workspace, void* factors, DType factors_dtype,
                  cudaStream_t stream) {
  Arena arena(workspace);
  const HostTables tables(problem, arena);
  const Tables& t = tables.device;
  const cudaError_t error = tables.copy_to_device(stream);
  if (error != cudaSuccess) return error;
  EFLAT_LAUNCH(reduce_kernel, t.reduce_count, kThreads, kSharedBytes, stream, t);
  EFLAT_LAUNCH(applied_norm_kernel, t.pair_count, 32, 0, stream, t);
  EFLAT_LAUNCH(bound_kernel, 1, 1, 0, stream, t, problem.rho, problem.global_norm, factors,
               factors_dtype);
  return cudaGetLastError();
}

}  // namespace eflat::cuda
