// torch.ops.eflat on the CPU.
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
  static constexpr int kMaxRank = 1 << 13;  // 4 r^2 numbers fit an int
  static constexpr bool kReadsSteps = false;

  explicit Cpu(const Tensor&) {}

  void perturb(const Problem& problem, const Tensor& norms, const Tensor* skipped) {
    std::vector<double> values(problem.count);
    const int64_t left_alone =
        cpu::perturb(problem, values.data(), parallel_for, int(torch::stable::get_num_threads()));
    write(values, norms);
    if (skipped) *static_cast<int64_t*>(skipped->mutable_data_ptr()) += left_alone;
  }

  void bound(const Problem& problem, const Tensor& factors) {
    std::vector<double> values(problem.count);
    cpu::bound(problem, values.data(), parallel_for);
    write(values, factors);
  }
};

}  // namespace
}  // namespace eflat

STABLE_TORCH_LIBRARY_IMPL(eflat, CPU, m) { EFLAT_REGISTER(m, eflat::Cpu); }

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
