// The operators of torch.ops.eflat for one device, written once: a Device type says how to run a
// Problem. Data flow only; the mathematics is in coefficients.h and the kernels.
//
// struct Device {
//   static constexpr int kMaxRank;      // of the kernels; beyond, eflat_ext/ops/plain_torch.py
//   static constexpr bool kReadsSteps;  // the kernels read and raise steps that are on the device
//   explicit Device(const Tensor& on);
//   // norms: of problem.norms_dtype, (pairs); skipped: int64, 0-d, or null
//   void perturb(const Problem&, const Tensor& norms, const Tensor* skipped);
//   void bound(const Problem&, const Tensor& factors);  // factors: as norms
// };
//
// The dispatcher's functions take an operator's parameters one by one, and sort them into structs.
#pragma once
#include <array>
#include <tuple>

#include "adamw_arguments.h"
#include "overlaps.h"

namespace eflat {

using Norms = std::tuple<Tensors, Tensor>;
using Rtol = std::optional<double>;

template <class Result>
struct Results {
  static Result of(StableIValue* stack) { return torch::stable::detail::to<Result>(stack[0]); }
};
template <class... Each>
struct Results<std::tuple<Each...>> {
  static std::tuple<Each...> of(StableIValue* stack) {
    return at(stack, std::index_sequence_for<Each...>());
  }
  template <size_t... i>
  static std::tuple<Each...> at(StableIValue* stack, std::index_sequence<i...>) {
    return {torch::stable::detail::to<Each>(stack[i])...};
  }
};

// The operator of plain torch with this name, which the package defines in Python.
template <class Result, class... Args>
Result in_plain_torch(const char* name, const Args&... arguments) {
  std::array<StableIValue, std::max<size_t>(2, sizeof...(Args))> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return Results<Result>::of(stack.data());
}

// A: or averages onto it.
template <class Device>
bool beyond_kernels(const Tensors& A) {
  return std::any_of(A.begin(), A.end(),
                     [](const Tensor& a) { return a.dim() == 2 && a.size(0) > Device::kMaxRank; });
}

template <class Device>
Norms perturb_pairs(Settings settings, FactorLists lists) {
  Arguments arguments(Device::kMaxRank, std::move(settings), std::move(lists));
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
  Arguments arguments(Device::kMaxRank, std::move(settings), std::move(lists));
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
  if (beyond_kernels<Device>(A)) {
    return in_plain_torch<Norms>("eflat_plain_torch::foreach_perturb", A, B, grad_A, grad_B,
                                 scaling, rho, onto, norm_scope, rtol);
  }
  return perturb_pairs<Device>(
      {rho, onto, norm_scope, rtol},
      {std::move(A), std::move(B), std::move(grad_A), std::move(grad_B), std::move(scaling)});
}

template <class Device>
std::tuple<Tensor, Tensor> perturb(Tensor A, Tensor B, Tensor grad_A, Tensor grad_B, double scaling,
                                   double rho, std::string onto, Rtol rtol) {
  STD_TORCH_CHECK(onto != "both", "onto must be 'B' or 'A', got 'both', which has two E: see ",
                  "foreach_perturb");
  if (beyond_kernels<Device>({A})) {
    return in_plain_torch<std::tuple<Tensor, Tensor>>("eflat_plain_torch::perturb", A, B, grad_A,
                                                      grad_B, scaling, rho, onto, rtol);
  }
  const auto [E, norm] = perturb_pairs<Device>({rho, onto, "layer", rtol},
                                               {{A}, {B}, {grad_A}, {grad_B}, {scaling}, true});
  return {E[0], norm};
}

template <class Device>
Tensor foreach_perturb_ema_(Tensors A, Tensors B, Tensors grad_A, Tensors grad_B, Tensors E,
                            Tensors ema, Tensor skipped, Numbers scaling, double rho, double beta,
                            std::string onto, std::string norm_scope, Rtol rtol) {
  if (beyond_kernels<Device>(A)) {
    return in_plain_torch<Tensor>("eflat_plain_torch::foreach_perturb_ema_", A, B, grad_A, grad_B,
                                  E, ema, skipped, scaling, rho, beta, onto, norm_scope, rtol);
  }
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
  if (beyond_kernels<Device>(A)) {
    return in_plain_torch<Tensor>("eflat_plain_torch::foreach_adamw_step_", A, B, grad_A, grad_B, E,
                                  ema, exp_avg, exp_avg_sq, step, skipped, scaling, rho, beta, lr,
                                  beta1, beta2, eps, weight_decay, onto, norm_scope, rtol);
  }
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
  if (beyond_kernels<Device>(ema)) {
    return in_plain_torch<Tensor>("eflat_plain_torch::foreach_bound", ema, B, scaling, rho,
                                  norm_scope);
  }
  Arguments arguments(Device::kMaxRank, {rho, "A", norm_scope, std::nullopt});
  arguments.add_averages_onto_A(ema, B, scaling);
  const Tensor factors = arguments.new_norms(ema[0]);
  Device device(ema[0]);
  device.bound(arguments.problem(false), factors);
  return factors;
}

// Registration; m is a library of STABLE_TORCH_LIBRARY_IMPL. The schemas are those of
// eflat_ext/ops/schemas.py.
#define EFLAT_REGISTER(m, Device)                                                  \
  m.impl("perturb", TORCH_BOX(&eflat::perturb<Device>));                           \
  m.impl("foreach_perturb", TORCH_BOX(&eflat::foreach_perturb<Device>));           \
  m.impl("foreach_perturb_ema_", TORCH_BOX(&eflat::foreach_perturb_ema_<Device>)); \
  m.impl("foreach_adamw_step_", TORCH_BOX(&eflat::foreach_adamw_step_<Device>));   \
  m.impl("foreach_bound", TORCH_BOX(&eflat::foreach_bound<Device>))

}  // namespace eflat
