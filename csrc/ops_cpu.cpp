// torch.ops.eflat: schemas, the CPU implementation, and the empty list, which has no device.
#include <Python.h>

#include <atomic>
#include <type_traits>

#include "cpu/perturb.h"
#include "operators.h"

namespace eflat {
namespace {

// torch's own threads; blocks differ in size, so they are handed out one by one.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  auto worker = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i);
  };
  if (threads <= 1) return worker(0, 1);
  torch::stable::parallel_for(0, threads, 1, worker);
}

void write(const std::vector<double>& values, const Tensor& out) {
  if (out.scalar_type() == ScalarType::Double) {
    std::copy(values.begin(), values.end(), static_cast<double*>(out.mutable_data_ptr()));
  } else {
    std::transform(values.begin(), values.end(), static_cast<float*>(out.mutable_data_ptr()),
                   [](double x) { return static_cast<float>(x); });
  }
}

struct Cpu {
  static constexpr bool kReadsSteps = false;

  explicit Cpu(const Tensor&) {}

  void perturb(const Problem& problem, const Tensor& norms, const Tensor* skipped) {
    std::vector<double> values(problem.count);
    const int64_t left_alone =
        cpu::perturb(problem, values.data(), parallel_for, int(torch::stable::get_num_threads()));
    write(values, norms);
    if (skipped) *static_cast<int64_t*>(skipped->mutable_data_ptr()) += left_alone;
  }

  void bound(const std::vector<Pair>& pairs, double rho, bool global_norm, const Tensor& factors) {
    std::vector<double> values(pairs.size());
    cpu::bound(pairs.data(), int(pairs.size()), rho, global_norm, values.data(), parallel_for);
    write(values, factors);
  }
};

// What is called where no kernel is registered for the arguments' device, or nothing has one.
constexpr const char* kNoKernels =
    "this build of eflat_ext has no kernels for the device or layout of its arguments: they must "
    "be "
    "dense, and CUDA tensors need a build with EFLAT_CUDA=1";

Tensor no_pairs(size_t count) {
  STD_TORCH_CHECK(count == 0, kNoKernels);
  const std::vector<int64_t> empty{0};
  return torch::stable::empty(empty, ScalarType::Float);
}

std::tuple<Tensor, Tensor> no_perturb(Tensor A, Tensor, Tensor, Tensor, double, double, std::string,
                                      std::optional<double>) {
  STD_TORCH_CHECK(false, kNoKernels);
  return {A, A};
}

Tensor no_foreach_perturb_ema_(std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                               std::vector<Tensor>, std::vector<Tensor>, Tensor skipped,
                               std::vector<double>, double, double, std::string, std::string,
                               std::optional<double>) {
  STD_TORCH_CHECK(false, kNoKernels);
  return skipped;
}

Tensor no_foreach_adamw_step_(std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                              std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                              std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                              Tensor skipped, std::vector<double>, double, double,
                              std::vector<double>, std::vector<double>, std::vector<double>,
                              std::vector<double>, std::vector<double>, std::string, std::string,
                              std::optional<double>) {
  STD_TORCH_CHECK(false, kNoKernels);
  return skipped;
}

Norms empty_foreach_perturb(std::vector<Tensor> A, std::vector<Tensor> B,
                            std::vector<Tensor> grad_A, std::vector<Tensor> grad_B,
                            std::vector<double> scaling, double rho, std::string onto,
                            std::string norm_scope, std::optional<double> rtol) {
  Arguments(onto, norm_scope, rho, rtol);
  Arguments::check_lengths(A, B, grad_A, grad_B, scaling);
  return {std::vector<Tensor>{}, no_pairs(A.size())};
}

Tensor empty_foreach_bound(std::vector<Tensor> ema, std::vector<Tensor> B,
                           std::vector<double> scaling, double rho, std::string norm_scope) {
  Arguments("A", norm_scope, rho, std::nullopt);
  check_length("B", B.size(), ema.size());
  check_length("scaling", scaling.size(), ema.size());
  return no_pairs(ema.size());
}

}  // namespace
}  // namespace eflat

STABLE_TORCH_LIBRARY(eflat, m) { EFLAT_DEFINE(m); }

STABLE_TORCH_LIBRARY_IMPL(eflat, CPU, m) { EFLAT_REGISTER(m, eflat::Cpu); }

STABLE_TORCH_LIBRARY_IMPL(eflat, CompositeExplicitAutograd, m) {
  m.impl("perturb", TORCH_BOX(&eflat::no_perturb));
  m.impl("foreach_perturb", TORCH_BOX(&eflat::empty_foreach_perturb));
  m.impl("foreach_perturb_ema_", TORCH_BOX(&eflat::no_foreach_perturb_ema_));
  m.impl("foreach_adamw_step_", TORCH_BOX(&eflat::no_foreach_adamw_step_));
  m.impl("foreach_bound", TORCH_BOX(&eflat::empty_foreach_bound));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
