// torch.ops.eflat_host_cuda: the operators of torch.ops.eflat on CPU tensors, computed by the CUDA
// kernels run on the host. For the tests; not part of the package.
#define EFLAT_HOST_CUDA "../tests/host_cuda.h"
#include "../cuda/launch.cu"
#include "../operators.h"

namespace eflat {
namespace {

struct HostCuda {
  static constexpr bool kReadsSteps = true;
  explicit HostCuda(const Tensor&) {}

  void perturb(const Problem& problem, const Tensor& norms, const Tensor* skipped) {
    std::vector<double> space = workspace(problem);
    auto* count = skipped ? static_cast<int64_t*>(skipped->mutable_data_ptr()) : nullptr;
    const cudaError_t error =
        cuda::perturb(problem, space.data(), norms.mutable_data_ptr(), count, nullptr);
    STD_TORCH_CHECK(error == cudaSuccess, "cudaError_t ", int(error));
  }

  void bound(const std::vector<Pair>& pairs, double rho, bool global_norm, const Tensor& factors) {
    const Problem problem{pairs.data(), int(pairs.size()), rho,
                          global_norm,  {false, 0},        dtype_of(factors)};
    std::vector<double> space = workspace(problem);
    cuda::bound(problem, space.data(), factors.mutable_data_ptr(), dtype_of(factors), nullptr);
  }

 private:
  // NaN: what was never written is seen.
  static std::vector<double> workspace(const Problem& problem) {
    return std::vector<double>(cuda::workspace_bytes(problem) / sizeof(double) + 1, NAN);
  }
};

}  // namespace
}  // namespace eflat

STABLE_TORCH_LIBRARY(eflat_host_cuda, m) { EFLAT_DEFINE(m); }
STABLE_TORCH_LIBRARY_IMPL(eflat_host_cuda, CPU, m) { EFLAT_REGISTER(m, eflat::HostCuda); }
