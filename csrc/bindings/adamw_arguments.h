// The arguments of foreach_adamw_step_ that are AdamW's, checked.
#pragma once
#include "arguments.h"

namespace eflat {

// Two entries per pair: those of all A, then those of all B.
struct AdamWLists {
  Tensors exp_avg, exp_avg_sq, step;
  Numbers lr, beta1, beta2, eps, weight_decay;
};

// The optimizer's steps, which the sides of `arguments.pairs` point to.
class AdamWSteps {
 public:
  // on_device: the kernels read and raise those of the lists' steps that are on the device.
  AdamWSteps(Arguments& arguments, const AdamWLists& lists, bool on_device)
      : lists_(lists), on_device_(on_device) {
    const FactorLists& factors = arguments.lists;
    const size_t pairs = factors.A.size(), count = 2 * pairs;
    const std::pair<const char*, size_t> given[] = {
        {"exp_avg", lists_.exp_avg.size()}, {"exp_avg_sq", lists_.exp_avg_sq.size()},
        {"step", lists_.step.size()},       {"lr", lists_.lr.size()},
        {"beta1", lists_.beta1.size()},     {"beta2", lists_.beta2.size()},
        {"eps", lists_.eps.size()},         {"weight_decay", lists_.weight_decay.size()}};
    for (const auto& [name, size] : given) check_length(name, size, count, kTwoEntries);
    steps_.reserve(count);  // pointers into it stay
    for (size_t i = 0; i < count; ++i) {
      const bool is_A = i < pairs;
      const size_t l = i % pairs;
      const Tensor& factor = (is_A ? factors.A : factors.B)[l];
      steps_.push_back(of_factor(factor, argument(is_A ? "A" : "B", l), i));
      Pair& pair = arguments.pairs[l];
      Side& side = pair.target.transposed == is_A ? pair.target : pair.other;
      side.step = &steps_.back();
      // Written memory of a tensor that is copied on write is not what was there to be read.
      side.factor = steps_.back().factor;
    }
  }

  // The memory of all steps, as in the list.
  const std::vector<float*>& counters() const { return counters_; }

  // Counts this step where no kernel does.
  void raise() const {
    for (const auto& [step, number] : on_host_) *step = number;
  }

 private:
  AdamW of_factor(const Tensor& factor, const std::string& name, size_t i) {
    AdamW a{};
    a.factor = written(factor, name);
    a.exp_avg = moment(lists_.exp_avg[i], argument("exp_avg", i), factor, name);
    a.exp_avg_sq = moment(lists_.exp_avg_sq[i], argument("exp_avg_sq", i), factor, name);
    a.lr = number("lr", lists_.lr, i, 0, INFINITY);
    a.beta1 = number("beta1", lists_.beta1, i, 0, 1);
    a.beta2 = number("beta2", lists_.beta2, i, 0, 1);
    a.eps = number("eps", lists_.eps, i, 0, INFINITY);
    a.weight_decay = number("weight_decay", lists_.weight_decay, i, -INFINITY, INFINITY);
    const Tensor& step = lists_.step[i];
    const std::string step_name = argument("step", i);
    STD_TORCH_CHECK(type_of(step) == ScalarType::Float && step.dim() == 0, step_name,
                    " must be a float32 tensor without dimensions, got ", dtype_name(type_of(step)),
                    " of shape ", shape_of(step));
    auto* at = static_cast<float*>(written(step, step_name));
    counters_.push_back(at);
    if (on_device_ && step.device() == factor.device()) {
      a.step = at;
    } else {
      STD_TORCH_CHECK(step.is_cpu(), step_name, " must be on the CPU or on the device of ", name);
      STD_TORCH_CHECK(*at >= 0, step_name, " must be at least 0, got ", *at);
      a.step_number = *at + 1;
      on_host_.emplace_back(at, *at + 1);
    }
    return a;
  }

  static void* moment(const Tensor& t, const std::string& name, const Tensor& factor,
                      const std::string& factor_name) {
    check_shape_and_device(t, name, factor, factor_name);
    check_dtype(t, name, factor, factor_name);
    return written(t, name);
  }

  // Finite, at least `least` and less than `bound`.
  static double number(const char* name, const Numbers& values, size_t i, double least,
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

  const AdamWLists& lists_;
  const bool on_device_;
  std::vector<AdamW> steps_;
  std::vector<float*> counters_;
  std::vector<std::pair<float*, float>> on_host_;
};

}  // namespace eflat
