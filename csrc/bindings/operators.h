// The operators of torch.ops.eflat for one device, written once: a Device type says how to run a
// Problem. Data flow only; the mathematics is in coefficients.h and the kernels.
//
// struct Device {
//   static constexpr bool kReadsSteps;  // whether the kernels read and raise steps on the device
//   explicit Device(const Tensor& on);
//   // norms: float64 or float32, (pairs); skipped: int64, 0-d, or null
//   void perturb(const Problem&, const Tensor& norms, const Tensor* skipped);
//   // factors: as norms
//   void bound(const std::vector<Pair>&, double rho, bool global_norm, const Tensor& factors);
// };
#pragma once
#include <tuple>

#include "adamw_arguments.h"
#include "overlaps.h"

namespace eflat {

using Norms = std::tuple<std::vector<Tensor>, Tensor>;

template <class Device>
Norms foreach_perturb(std::vector<Tensor> A, std::vector<Tensor> B, std::vector<Tensor> grad_A,
                      std::vector<Tensor> grad_B, std::vector<double> scaling, double rho,
                      std::string onto, std::string norm_scope, std::optional<double> rtol) {
  Arguments arguments(onto, norm_scope, rho, rtol);
  const Tensor norms = arguments.add_all(A, B, grad_A, grad_B, scaling, rtol);
  Device device(A[0]);
  std::vector<Tensor> E;
  for (int64_t i = 0; i < arguments.perturbed_count(A.size()); ++i) {
    const Tensor& target = arguments.perturbed(i, A, B);
    E.push_back(torch::stable::new_empty(target, {target.size(0), target.size(1)}));
    arguments.out_of(i) = E.back().mutable_data_ptr();
  }
  for (Pair& pair : arguments.pairs) pair.out_dtype = pair.dtype;
  device.perturb(arguments.problem(rho, {false, 0}), norms, nullptr);
  return {E, norms};
}

template <class Device>
std::tuple<Tensor, Tensor> perturb(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, double scaling,
                                   double rho, std::string onto, std::optional<double> rtol) {
  Arguments arguments(onto, "layer", rho, rtol);
  STD_TORCH_CHECK(!arguments.both, "onto must be 'B' or 'A', got 'both', which has two E: see ",
                  "foreach_perturb");
  arguments.add(A, B, grad_A, grad_B, scaling, rtol, -1);
  Device device(A);
  const Tensor& target = arguments.onto_B ? B : A;
  Tensor E = torch::stable::new_empty(target, {target.size(0), target.size(1)});
  const Tensor norm = arguments.new_norms(A, {});
  arguments.pairs[0].out = E.mutable_data_ptr();
  arguments.pairs[0].out_dtype = arguments.pairs[0].dtype;
  device.perturb(arguments.problem(rho, {false, 0}), norm, nullptr);
  return {E, norm};
}

template <class Device>
Tensor foreach_perturb_ema_(std::vector<Tensor> A, std::vector<Tensor> B,
                            std::vector<Tensor> grad_A, std::vector<Tensor> grad_B,
                            std::vector<Tensor> E, std::vector<Tensor> ema, Tensor skipped,
                            std::vector<double> scaling, double rho, double beta, std::string onto,
                            std::string norm_scope, std::optional<double> rtol) {
  Arguments arguments(onto, norm_scope, rho, rtol);
  const Tensor norms =
      arguments.add_averages(A, B, grad_A, grad_B, E, ema, skipped, scaling, beta, rtol);
  if (A.empty()) return norms;  // the counter alone has brought the call here
  check_overlaps(arguments, {}, skipped);
  Device device(A[0]);
  device.perturb(arguments.problem(rho, {true, beta}), norms, &skipped);
  return norms;
}

// As foreach_perturb_ema_; then every A and B takes a step of torch.optim.AdamW. Lists from exp_avg
// on hold two entries per pair, those of all A and those of all B; so do E and ema onto both.
template <class Device>
Tensor foreach_adamw_step_(std::vector<Tensor> A, std::vector<Tensor> B, std::vector<Tensor> grad_A,
                           std::vector<Tensor> grad_B, std::vector<Tensor> E,
                           std::vector<Tensor> ema, std::vector<Tensor> exp_avg,
                           std::vector<Tensor> exp_avg_sq, std::vector<Tensor> step, Tensor skipped,
                           std::vector<double> scaling, double rho, double beta,
                           std::vector<double> lr, std::vector<double> beta1,
                           std::vector<double> beta2, std::vector<double> eps,
                           std::vector<double> weight_decay, std::string onto,
                           std::string norm_scope, std::optional<double> rtol) {
  Arguments arguments(onto, norm_scope, rho, rtol);
  const Tensor norms =
      arguments.add_averages(A, B, grad_A, grad_B, E, ema, skipped, scaling, beta, rtol);
  const AdamWSteps steps(arguments, A, B,
                         {exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay},
                         Device::kReadsSteps);
  if (A.empty()) return norms;
  check_overlaps(arguments, steps.counters(), skipped);
  Device device(A[0]);
  device.perturb(arguments.problem(rho, {true, beta}), norms, &skipped);
  steps.raise();
  return norms;
}

template <class Device>
Tensor foreach_bound(std::vector<Tensor> ema, std::vector<Tensor> B, std::vector<double> scaling,
                     double rho, std::string norm_scope) {
  Arguments arguments("A", norm_scope, rho, std::nullopt);
  check_length("B", B.size(), ema.size());
  check_length("scaling", scaling.size(), ema.size());
  for (size_t l = 0; l < ema.size(); ++l)
    arguments.add_applied(ema[l], B[l], scaling[l], int64_t(l), ema[0]);
  const Tensor factors = arguments.new_norms(ema[0], {int64_t(ema.size())});
  Device device(ema[0]);
  device.bound(arguments.pairs, rho, arguments.global_norm, factors);
  return factors;
}

// Schemas and registration; m is a library of STABLE_TORCH_LIBRARY or STABLE_TORCH_LIBRARY_IMPL.
#define EFLAT_DEFINE(m)                                                                           \
  m.def(                                                                                          \
      "perturb(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, float scaling, float rho, "      \
      "str onto=\"B\", float? rtol=None) -> (Tensor E, Tensor norm)");                            \
  m.def(                                                                                          \
      "foreach_perturb(Tensor[] A, Tensor[] B, Tensor[] grad_A, Tensor[] grad_B, "                \
      "float[] scaling, float rho, str onto=\"B\", str norm_scope=\"layer\", "                    \
      "float? rtol=None) -> (Tensor[] E, Tensor norms)");                                         \
  m.def(                                                                                          \
      "foreach_perturb_ema_(Tensor[] A, Tensor[] B, Tensor[] grad_A, Tensor[] grad_B, "           \
      "Tensor[] E, Tensor(a!)[] ema, Tensor(b!) skipped, float[] scaling, float rho, "            \
      "float beta, str onto=\"B\", str norm_scope=\"layer\", float? rtol=None) -> Tensor norms"); \
  m.def(                                                                                          \
      "foreach_adamw_step_(Tensor(a!)[] A, Tensor(b!)[] B, Tensor[] grad_A, "                     \
      "Tensor[] grad_B, Tensor[] E, Tensor(c!)[] ema, Tensor(d!)[] exp_avg, "                     \
      "Tensor(e!)[] exp_avg_sq, Tensor(f!)[] step, Tensor(g!) skipped, float[] scaling, "         \
      "float rho, float beta, float[] lr, float[] beta1, float[] beta2, float[] eps, "            \
      "float[] weight_decay, str onto=\"B\", str norm_scope=\"layer\", "                          \
      "float? rtol=None) -> Tensor norms");                                                       \
  m.def(                                                                                          \
      "foreach_bound(Tensor[] ema, Tensor[] B, float[] scaling, float rho, "                      \
      "str norm_scope=\"layer\") -> Tensor factors")

#define EFLAT_REGISTER(m, Device)                                                  \
  m.impl("perturb", TORCH_BOX(&eflat::perturb<Device>));                           \
  m.impl("foreach_perturb", TORCH_BOX(&eflat::foreach_perturb<Device>));           \
  m.impl("foreach_perturb_ema_", TORCH_BOX(&eflat::foreach_perturb_ema_<Device>)); \
  m.impl("foreach_adamw_step_", TORCH_BOX(&eflat::foreach_adamw_step_<Device>));   \
  m.impl("foreach_bound", TORCH_BOX(&eflat::foreach_bound<Device>))

}  // namespace eflat
