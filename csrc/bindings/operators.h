// The operators of torch.ops.eflat for one device, written once: a Device type says how to run a
// Problem. Data flow only; the mathematics is in coefficients.h and the kernels.
//
// struct Device {
//   static constexpr bool kReadsSteps;  // the kernels read and raise steps that are on the device
//   explicit Device(const Tensor& on);
//   // norms: of problem.norms_dtype, (pairs); skipped: int64, 0-d, or null
//   void perturb(const Problem&, const Tensor& norms, const Tensor* skipped);
//   void bound(const Problem&, const Tensor& factors);  // factors: as norms
// };
//
// The dispatcher's functions take an operator's parameters one by one, and sort them into structs.
#pragma once
#include <tuple>

#include "adamw_arguments.h"
#include "overlaps.h"

namespace eflat {

using Norms = std::tuple<Tensors, Tensor>;
using Rtol = std::optional<double>;

template <class Device>
Norms perturb_pairs(Settings settings, FactorLists lists) {
  Arguments arguments(std::move(settings), std::move(lists));
  const Tensor& first = arguments.lists.A[0];
  Device device(first);
  Tensors E = arguments.new_perturbations();
  const Tensor norms = arguments.new_norms(first);
  device.perturb(arguments.problem(false), norms, nullptr);
  return {std::move(E), norms};
}

// adamw: null, or every A and B then takes a step of torch.optim.AdamW.
template <class Device>
Tensor average_pairs(Settings settings, FactorLists lists, const AverageLists& averages,
                     const AdamWLists* adamw) {
  Arguments arguments(std::move(settings), std::move(lists));
  arguments.add_averages(averages);
  std::optional<AdamWSteps> steps;
  if (adamw) steps.emplace(arguments, *adamw, Device::kReadsSteps);
  const Tensor &skipped = averages.skipped, norms = arguments.new_norms(skipped);
  if (arguments.pairs.empty()) return norms;  // the counter alone has brought the call here
  check_overlaps(arguments, steps ? steps->counters() : std::vector<float*>(), skipped);
  Device device(skipped);
  device.perturb(arguments.problem(true), norms, &skipped);
  if (steps) steps->raise();
  return norms;
}

template <class Device>
Norms foreach_perturb(Tensors A, Tensors B, Tensors grad_A, Tensors grad_B, Numbers scaling,
                      double rho, std::string onto, std::string norm_scope, Rtol rtol) {
  return perturb_pairs<Device>(
      {rho, onto, norm_scope, rtol},
      {std::move(A), std::move(B), std::move(grad_A), std::move(grad_B), std::move(scaling)});
}

template <class Device>
std::tuple<Tensor, Tensor> perturb(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, double scaling,
                                   double rho, std::string onto, Rtol rtol) {
  STD_TORCH_CHECK(onto != "both", "onto must be 'B' or 'A', got 'both', which has two E: see ",
                  "foreach_perturb");
  const auto [E, norm] = perturb_pairs<Device>({rho, onto, "layer", rtol},
                                               {{A}, {B}, {grad_A}, {grad_B}, {scaling}, true});
  return {E[0], norm};
}

template <class Device>
Tensor foreach_perturb_ema_(Tensors A, Tensors B, Tensors grad_A, Tensors grad_B, Tensors E,
                            Tensors ema, Tensor skipped, Numbers scaling, double rho, double beta,
                            std::string onto, std::string norm_scope, Rtol rtol) {
  return average_pairs<Device>(
      {rho, onto, norm_scope, rtol, beta},
      {std::move(A), std::move(B), std::move(grad_A), std::move(grad_B), std::move(scaling)},
      {std::move(E), std::move(ema), skipped}, nullptr);
}

template <class Device>
Tensor foreach_adamw_step_(Tensors A, Tensors B, Tensors grad_A, Tensors grad_B, Tensors E,
                           Tensors ema, Tensors exp_avg, Tensors exp_avg_sq, Tensors step,
                           Tensor skipped, Numbers scaling, double rho, double beta, Numbers lr,
                           Numbers beta1, Numbers beta2, Numbers eps, Numbers weight_decay,
                           std::string onto, std::string norm_scope, Rtol rtol) {
  const AdamWLists adamw{
      std::move(exp_avg), std::move(exp_avg_sq), std::move(step), lr, beta1, beta2, eps,
      weight_decay};
  return average_pairs<Device>(
      {rho, onto, norm_scope, rtol, beta},
      {std::move(A), std::move(B), std::move(grad_A), std::move(grad_B), std::move(scaling)},
      {std::move(E), std::move(ema), skipped}, &adamw);
}

template <class Device>
Tensor foreach_bound(Tensors ema, Tensors B, Numbers scaling, double rho, std::string norm_scope) {
  Arguments arguments({rho, "A", norm_scope, std::nullopt});
  arguments.add_averages_onto_A(ema, B, scaling);
  const Tensor factors = arguments.new_norms(ema[0]);
  Device device(ema[0]);
  device.bound(arguments.problem(false), factors);
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
