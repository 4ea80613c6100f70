// The arguments of foreach_adamw_step_ that are AdamW's, checked.
#pragma once
#include "arguments.h"

namespace eflat {

// Lists of two entries per pair: those of all A, then those of all B.
struct AdamWLists {
  const std::vector<Tensor>&exp_avg, &exp_avg_sq, &step;
  const std::vector<double>&lr, &beta1, &beta2, &eps, &weight_decay;

  void check_lengths(size_t pairs) const {
    const std::pair<const char*, size_t> given[] = {
        {"exp_avg", exp_avg.size()}, {"exp_avg_sq", exp_avg_sq.size()},
        {"step", step.size()},       {"lr", lr.size()},
        {"beta1", beta1.size()},     {"beta2", beta2.size()},
        {"eps", eps.size()},         {"weight_decay", weight_decay.size()}};
    for (const auto& [name, size] : given) {
      STD_TORCH_CHECK(size == 2 * pairs, name, " must have two entries per pair, all A and all B, ",
                      2 * pairs, ", got ", size);
    }
  }
};

// The steps of all pairs, which `arguments.pairs` point to.
class AdamWSteps {
 public:
  // on_device: whether the kernels read and raise those of the lists' steps that are on the device.
  AdamWSteps(Arguments& arguments, const std::vector<Tensor>& A, const std::vector<Tensor>& B,
             const AdamWLists& lists, bool on_device)
      : on_device_(on_device) {
    lists.check_lengths(A.size());
    steps_.reserve(A.size());
    counters_.resize(2 * A.size());
    for (size_t l = 0; l < A.size(); ++l) {
      const AdamW a = of_factor(A[l], "A", l, lists, l),
                  b = of_factor(B[l], "B", l, lists, A.size() + l);
      steps_.push_back(arguments.onto_B ? Step{b, a} : Step{a, b});
      Pair& pair = arguments.pairs[l];
      pair.step = &steps_.back();
      // Written memory of a tensor that is copied on write is not what was there to be read.
      pair.target.factor = pair.step->target.factor;
      pair.other.factor = pair.step->other.factor;
    }
  }

  // The memory of all steps, as in the list.
  const std::vector<float*>& counters() const { return counters_; }

  // Counts this step where no kernel does.
  void raise() const {
    for (const auto& [step, number] : on_host_) *step = number;
  }

 private:
  AdamW of_factor(const Tensor& factor, const char* factor_name, int64_t pair,
                  const AdamWLists& lists, int64_t i) {
    const std::string like = argument(factor_name, pair);
    AdamW a{};
    a.factor = written(factor, like);
    for (const auto& [list, list_name] :
         {std::pair(&lists.exp_avg, "exp_avg"), std::pair(&lists.exp_avg_sq, "exp_avg_sq")}) {
      const std::string name = argument(list_name, i);
      check_like((*list)[i], name, factor, like);
      check_dtype_and_device((*list)[i], name, factor, like);
      (list == &lists.exp_avg ? a.exp_avg : a.exp_avg_sq) = written((*list)[i], name);
    }
    a.lr = number("lr", lists.lr, i, 0, INFINITY);
    a.beta1 = number("beta1", lists.beta1, i, 0, 1);
    a.beta2 = number("beta2", lists.beta2, i, 0, 1);
    a.eps = number("eps", lists.eps, i, 0, INFINITY);
    a.weight_decay = number("weight_decay", lists.weight_decay, i, -INFINITY, INFINITY);
    const Tensor& step = lists.step[i];
    const std::string name = argument("step", i);
    STD_TORCH_CHECK(type_of(step) == ScalarType::Float && step.dim() == 0, name,
                    " must be a float32 tensor without dimensions, got ", dtype_name(type_of(step)),
                    " of shape ", shape_of(step));
    float* at = counters_[i] = static_cast<float*>(written(step, name));
    if (on_device_ && step.device() == factor.device()) {
      a.step = at;
    } else {
      STD_TORCH_CHECK(step.is_cpu(), name, " must be on the CPU or on the device of ", like);
      STD_TORCH_CHECK(*at >= 0, name, " must be at least 0, got ", *at);
      a.step_number = *at + 1;
      on_host_.emplace_back(at, *at + 1);
    }
    return a;
  }

  // Finite, at least `least` and less than `bound`.
  static double number(const char* name, const std::vector<double>& values, int64_t i, double least,
                       double bound) {
    const double x = values[i];
    STD_TORCH_CHECK(std::isfinite(x) && x >= least && x < bound, argument(name, i),
                    " must be finite",
                    std::isfinite(bound)   ? " and in [0, 1)"
                    : std::isfinite(least) ? " and at least 0"
                                           : "",
                    ", got ", x);
    return x;
  }

  const bool on_device_;
  std::vector<Step> steps_;
  std::vector<float*> counters_;
  std::vector<std::pair<float*, float>> on_host_;
};

}  // namespace eflat
