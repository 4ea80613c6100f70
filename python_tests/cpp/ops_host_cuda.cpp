// torch.ops.eflat_float64 and torch.ops.eflat_two_float: the operators of torch.ops.eflat on CPU
// tensors, computed by the CUDA kernels run on the host, in both of their arithmetics. For the
// tests; not part of the package.
#define EFLAT_HOST_CUDA "../../python_tests/cpp/host_cuda.h"
#include <mutex>

#include "../../csrc/bindings/operators.h"
#include "../../csrc/cuda/launch.cu"
#include "naive.h"

namespace eflat {
namespace {

std::mutex one_at_a_time;  // the executor knows one launch

template <cuda::Arithmetic arithmetic>
struct HostCuda {
  static constexpr int kMaxRank = 256;
  static constexpr bool kReadsSteps = true;
  explicit HostCuda(const Tensor&) {}

  void perturb(const Problem& problem, const Tensor& norms, const Tensor* skipped) {
    const std::lock_guard lock(one_at_a_time);
    std::vector<double> space = workspace(problem);
    auto* count = skipped ? static_cast<int64_t*>(skipped->mutable_data_ptr()) : nullptr;
    check(
        cuda::perturb(problem, space.data(), norms.mutable_data_ptr(), count, nullptr, arithmetic));
  }

  void bound(const Problem& problem, const Tensor& factors) {
    const std::lock_guard lock(one_at_a_time);
    std::vector<double> space = workspace(problem);
    check(cuda::bound(problem, space.data(), factors.mutable_data_ptr(), nullptr, arithmetic));
  }

 private:
  // NaN: what was never written is seen.
  static std::vector<double> workspace(const Problem& problem) {
    return std::vector<double>(cuda::workspace_bytes(problem) / sizeof(double) + 1, NAN);
  }
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "cudaError_t ", int(error));
  }
};

struct Naive {
  static constexpr int kMaxRank = 256;
  static constexpr bool kReadsSteps = false;
  explicit Naive(const Tensor&) {}
  void perturb(const Problem& problem, const Tensor& norms, const Tensor* skipped) {
    std::vector<double> values(problem.count, NAN);
    auto* count = skipped ? static_cast<int64_t*>(skipped->mutable_data_ptr()) : nullptr;
    cuda::naive::perturb(problem, values.data(), count);
    for (int l = 0; l < problem.count; ++l) {
      void* out = norms.mutable_data_ptr();
      if (problem.norms_dtype == DType::f64) static_cast<double*>(out)[l] = values[l];
      if (problem.norms_dtype == DType::f32) static_cast<float*>(out)[l] = float(values[l]);
    }
  }
  void bound(const Problem&, const Tensor&) { STD_TORCH_CHECK(false, "no naive kernel"); }
};

using Float64 = HostCuda<cuda::Arithmetic::float64>;
using TwoFloat = HostCuda<cuda::Arithmetic::two_float>;

}  // namespace
}  // namespace eflat

STABLE_TORCH_LIBRARY_IMPL(eflat_float64, CPU, m) { EFLAT_REGISTER(m, eflat::Float64); }
STABLE_TORCH_LIBRARY_IMPL(eflat_two_float, CPU, m) { EFLAT_REGISTER(m, eflat::TwoFloat); }
STABLE_TORCH_LIBRARY_IMPL(eflat_naive, CPU, m) { EFLAT_REGISTER(m, eflat::Naive); }
