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

// What is called where no kernel is registered for the device or layout of an argument: the others
// have pulled nothing here, so the first that is no plain CPU tensor is to blame.
struct Given {
  const char* name;
  std::vector<Tensor> tensors;
  bool list = true;
};

void refuse(std::initializer_list<Given> arguments) {
  for (const Given& given : arguments) {
    for (size_t i = 0; i < given.tensors.size(); ++i) {
      const Tensor& t = given.tensors[i];
      int32_t layout, type;  // not as a ScalarType, which knows no quantized ones
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
      const bool dense = layout == aoti_torch_layout_strided();
      const bool quantized =
          (type >= int32_t(ScalarType::QInt8) && type <= int32_t(ScalarType::QInt32));
      STD_TORCH_CHECK(dense && t.is_cpu() && !quantized, argument(given.name, given.list ? i : -1),
                      " must be a dense tensor on the CPU, got ",
                      !dense      ? "another layout"
                      : quantized ? "a quantized one"
                                  : "another device",
                      ": this build of eflat_ext has no kernels for the device or layout of it, "
                      "and CUDA tensors need one with EFLAT_CUDA=1");
    }
  }
}

std::tuple<Tensor, Tensor> no_perturb(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, double,
                                      double, std::string, std::optional<double>) {
  refuse({{"A", {A}, false},
          {"B", {B}, false},
          {"grad_A", {grad_A}, false},
          {"grad_B", {grad_B}, false}});
  return {A, A};
}

Tensor no_foreach_perturb_ema_(std::vector<Tensor> A, std::vector<Tensor> B,
                               std::vector<Tensor> grad_A, std::vector<Tensor> grad_B,
                               std::vector<Tensor> ema, Tensor skipped, std::vector<double>, double,
                               double, std::string, std::string, std::optional<double>) {
  refuse({{"A", A},
          {"B", B},
          {"grad_A", grad_A},
          {"grad_B", grad_B},
          {"ema", ema},
          {"skipped", {skipped}, false}});
  return skipped;
}

Tensor no_foreach_adamw_step_(std::vector<Tensor> A, std::vector<Tensor> B,
                              std::vector<Tensor> grad_A, std::vector<Tensor> grad_B,
                              std::vector<Tensor> clean, std::vector<Tensor> ema,
                              std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq,
                              std::vector<Tensor> step, Tensor skipped, std::vector<double>, double,
                              double, std::vector<double>, std::vector<double>, std::vector<double>,
                              std::vector<double>, std::vector<double>, std::string, std::string,
                              std::optional<double>) {
  refuse({{"A", A},
          {"B", B},
          {"grad_A", grad_A},
          {"grad_B", grad_B},
          {"clean", clean},
          {"ema", ema},
          {"exp_avg", exp_avg},
          {"exp_avg_sq", exp_avg_sq},
          {"step", step},
          {"skipped", {skipped}, false}});
  return skipped;
}

Tensor no_norms() {
  const std::vector<int64_t> empty{0};
  return torch::stable::empty(empty, ScalarType::Float);
}

Norms empty_foreach_perturb(std::vector<Tensor> A, std::vector<Tensor> B,
                            std::vector<Tensor> grad_A, std::vector<Tensor> grad_B,
                            std::vector<double> scaling, double rho, std::string onto,
                            std::string norm_scope, std::optional<double> rtol) {
  Arguments(onto, norm_scope, rho, rtol);
  Arguments::check_lengths(A, B, grad_A, grad_B, scaling);
  refuse({{"A", A}, {"B", B}, {"grad_A", grad_A}, {"grad_B", grad_B}});
  return {std::vector<Tensor>{}, no_norms()};
}

Tensor empty_foreach_bound(std::vector<Tensor> ema, std::vector<Tensor> B,
                           std::vector<double> scaling, double rho, std::string norm_scope) {
  Arguments("A", norm_scope, rho, std::nullopt);
  check_length("B", B.size(), ema.size());
  check_length("scaling", scaling.size(), ema.size());
  refuse({{"ema", ema}, {"B", B}});
  return no_norms();
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
