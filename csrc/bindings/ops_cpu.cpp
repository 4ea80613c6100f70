// torch.ops.eflat: schemas, the CPU implementation, and the empty list, which has no device.
#include <Python.h>

#include <atomic>
#include <type_traits>

#include "../cpu/perturb.h"
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
  if (type_of(out) == ScalarType::Double) {
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
// have pulled nothing here, so the first that is no plain CPU tensor is to blame. One on another
// device is blamed last: it is right where a build has kernels for it.
struct Given {
  const char* name;
  std::vector<Tensor> tensors;
  bool list = true;
};

// What a tensor is beside dense and on the CPU; null: nothing.
const char* oddity(const Tensor& t) {
  if (!t.defined()) return "None";
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  if (layout != aoti_torch_layout_strided()) return "another layout";
  for (ScalarType q : {ScalarType::QInt8, ScalarType::QUInt8, ScalarType::QInt32,
                       ScalarType::QUInt4x2, ScalarType::QUInt2x4})
    if (type_of(t) == q) return "a quantized one";
  return nullptr;
}

void refuse(std::initializer_list<Given> arguments) {
  for (bool devices : {false, true}) {
    for (const Given& given : arguments) {
      for (size_t i = 0; i < given.tensors.size(); ++i) {
        const Tensor& t = given.tensors[i];
        const char* odd = !devices ? oddity(t) : t.is_cpu() ? nullptr : "another device";
        STD_TORCH_CHECK(!odd, argument(given.name, given.list ? i : -1),
                        " must be a dense tensor on the CPU, got ", odd,
                        ": this build of eflat_ext has no kernels for the device or layout of it, "
                        "and CUDA tensors need one with EFLAT_CUDA=1");
      }
    }
  }
}

// As refuse, of arguments of which one is to blame.
[[noreturn]] void refuse_one(std::initializer_list<Given> arguments) {
  refuse(arguments);
  STD_TORCH_CHECK(false, "every tensor must be a dense one on the CPU, got one of another kind");
}

std::tuple<Tensor, Tensor> no_perturb(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, double,
                                      double, std::string, std::optional<double>) {
  refuse_one({{"A", {A}, false},
              {"B", {B}, false},
              {"grad_A", {grad_A}, false},
              {"grad_B", {grad_B}, false}});
}

Tensor no_foreach_perturb_ema_(std::vector<Tensor> A, std::vector<Tensor> B,
                               std::vector<Tensor> grad_A, std::vector<Tensor> grad_B,
                               std::vector<Tensor> E, std::vector<Tensor> ema, Tensor skipped,
                               std::vector<double>, double, double, std::string, std::string,
                               std::optional<double>) {
  refuse_one({{"A", A},
              {"B", B},
              {"grad_A", grad_A},
              {"grad_B", grad_B},
              {"E", E},
              {"ema", ema},
              {"skipped", {skipped}, false}});
}

Tensor no_foreach_adamw_step_(std::vector<Tensor> A, std::vector<Tensor> B,
                              std::vector<Tensor> grad_A, std::vector<Tensor> grad_B,
                              std::vector<Tensor> E, std::vector<Tensor> ema,
                              std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq,
                              std::vector<Tensor> step, Tensor skipped, std::vector<double>, double,
                              double, std::vector<double>, std::vector<double>, std::vector<double>,
                              std::vector<double>, std::vector<double>, std::string, std::string,
                              std::optional<double>) {
  refuse_one({{"A", A},
              {"B", B},
              {"grad_A", grad_A},
              {"grad_B", grad_B},
              {"E", E},
              {"ema", ema},
              {"exp_avg", exp_avg},
              {"exp_avg_sq", exp_avg_sq},
              {"step", step},
              {"skipped", {skipped}, false}});
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
