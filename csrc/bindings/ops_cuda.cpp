// torch.ops.eflat on CUDA: the operators of operators.h on the current stream.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../cuda/launch.h"
#include "operators.h"

namespace eflat {
namespace {

class Cuda {
 public:
  static constexpr int kMaxRank = 256;  // a chunk of rows fits shared memory
  static constexpr bool kReadsSteps = true;

  explicit Cuda(const Tensor& on) : guard_(on.get_device_index()), on_(on) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void perturb(const Problem& problem, const Tensor& norms, const Tensor* skipped) {
    check_steps(problem);
    const Tensor space = workspace(problem);
    auto* count = skipped ? static_cast<int64_t*>(skipped->mutable_data_ptr()) : nullptr;
    STD_CUDA_CHECK(
        cuda::perturb(problem, space.mutable_data_ptr(), norms.mutable_data_ptr(), count, stream_));
  }

  void bound(const Problem& problem, const Tensor& factors) {
    const Tensor space = workspace(problem);
    STD_CUDA_CHECK(
        cuda::bound(problem, space.mutable_data_ptr(), factors.mutable_data_ptr(), stream_));
  }

 private:
  // A graph would repeat the step's number, and with it the bias correction of this one step.
  void check_steps(const Problem& problem) const {
    if (!problem.pairs[0].target.step) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
    if (status == cudaStreamCaptureStatusNone) return;
    for (int l = 0; l < problem.count; ++l) {
      const Pair& p = problem.pairs[l];
      STD_TORCH_CHECK(
          p.target.step->step && p.other.step->step, "step of pair ", l,
          " is on the CPU, where a CUDA graph cannot count: while a stream is captured, "
          "step must be on the device of A and B");
    }
  }

  // From torch's caching allocator, which keeps it for this stream until the kernels are done.
  Tensor workspace(const Problem& problem) const {
    const std::vector<int64_t> size{cuda::workspace_bytes(problem)};
    return torch::stable::new_empty(on_, size, ScalarType::Byte);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  const Tensor& on_;
  cudaStream_t stream_;
};

}  // namespace
}  // namespace eflat

STABLE_TORCH_LIBRARY_IMPL(eflat, CUDA, m) { EFLAT_REGISTER(m, eflat::Cuda); }

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
