// AdamW after a perturbation, without torch: both sides of pairs of any layout and type against the
// plain formula, with and without a usable norm, and the perturbation is what it is without a step.
#include <cmath>
#include <random>
#include <vector>

#include "../../csrc/cpu/perturb.h"
#include "check.h"

using namespace eflat;

namespace {

void serially(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = count - 1; i >= 0; --i) body(i);  // the order must not matter
}

enum class Onto { B, A, both };

template <class T>
using Values = std::vector<T>;  // of exactly its size: a sanitizer sees what is beyond

template <class T>
Values<T> normal(int64_t n, std::mt19937& random, bool positive = false) {
  std::normal_distribution<double> normal;
  Values<T> x(n);
  for (T& e : x) {
    const double value = normal(random);
    e = from_double<T>(positive ? value * value : value);
  }
  return x;
}

// A factor in training.
template <class T>
struct Factor {
  Values<T> value, grad, exp_avg, exp_avg_sq;
  AdamW adamw;

  Factor(int64_t n, double beta1, std::mt19937& random)
      : value(normal<T>(n, random)),
        grad(normal<T>(n, random)),
        exp_avg(normal<T>(n, random)),
        exp_avg_sq(normal<T>(n, random, true)) {
    adamw = {value.data(), exp_avg.data(), exp_avg_sq.data(), nullptr, 4, 0.1, beta1, 0.99, 1e-6,
             0.5};
  }

  // Compares with the step from `before`.
  void check(const Factor& before) const {
    const double eps = sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 1e-5 : 0.02;
    const AdamW& a = adamw;
    for (size_t i = 0; i < value.size(); ++i) {
      const double g = to_double(before.grad[i]);
      const double m = a.beta1 * to_double(before.exp_avg[i]) + (1 - a.beta1) * g;
      const double v = a.beta2 * to_double(before.exp_avg_sq[i]) + (1 - a.beta2) * g * g;
      const double denominator = std::sqrt(v / (1 - std::pow(a.beta2, 4))) + a.eps;
      const double x = to_double(before.value[i]) * (1 - a.lr * a.weight_decay) -
                       a.lr * m / (1 - std::pow(a.beta1, 4)) / denominator;
      CHECK(std::fabs(to_double(exp_avg[i]) - m) <= eps * (1 + std::fabs(m)), "exp_avg");
      CHECK(std::fabs(to_double(exp_avg_sq[i]) - v) <= eps * (1 + v), "exp_avg_sq");
      CHECK(std::fabs(to_double(value[i]) - x) <= eps * (2 + std::fabs(x)), "%g, expected %g",
            to_double(value[i]), x);
    }
  }
};

template <class T, class Average>
void pair_of(DType dtype, DType average_dtype, int n, int m, int r, Onto onto, bool usable,
             int threads, std::mt19937& random) {
  Factor<T> A(int64_t(r) * m, 0.9, random), B(int64_t(n) * r, 0.25, random);
  if (!usable) A.grad[0] = from_double<T>(NAN);
  const Factor<T> A_before = A, B_before = B;
  const bool onto_B = onto != Onto::A, both = onto == Onto::both;
  Factor<T>&target = onto_B ? B : A, &other = onto_B ? A : B;
  Values<Average> average = normal<Average>(target.value.size(), random), alone = average;
  Values<Average> average_other = normal<Average>(other.value.size(), random),
                  alone_other = average_other;
  const Side side_A{A.value.data(), A.grad.data(), m, true},
      side_B{B.value.data(), B.grad.data(), n, false};
  Pair pair{onto_B ? side_B : side_A, onto_B ? side_A : side_B, r, dtype, 2.0, 1e-5, average_dtype};
  auto average_into = [&](void* target_average, void* other_average) {  // which were added, too
    pair.target.added = pair.target.out = target_average;
    if (both) pair.other.added = pair.other.out = other_average;
  };
  average_into(alone.data(), alone_other.data());
  double norms[2];
  auto run = [&](double* norm) {
    return cpu::perturb({&pair, 1, 0.1, false, {true, 0.3}, DType::f64}, norm, serially, threads);
  };
  CHECK(run(norms) == !usable, "without a step");
  average_into(average.data(), average_other.data());
  pair.target.step = &target.adamw;
  pair.other.step = &other.adamw;
  CHECK(run(norms + 1) == !usable, "with a step");
  CHECK(memcmp(average.data(), alone.data(), sizeof(Average) * alone.size()) == 0, "average");
  CHECK(memcmp(average_other.data(), alone_other.data(), sizeof(Average) * alone_other.size()) == 0,
        "the other average");
  CHECK(memcmp(norms, norms + 1, sizeof(double)) == 0, "norm %g", norms[1]);
  if (!usable) {
    CHECK(std::isnan(to_double(A.value[0])), "a step that was told to be NaN");
    return;
  }
  A.check(A_before);
  B.check(B_before);
}

}  // namespace

int main() {
  std::mt19937 random(std::random_device{}());
  const int shapes[][3] = {{1, 1, 1}, {5, 4, 2}, {40, 30, 7}, {33, 1100, 16}, {1100, 50, 20}};
  for (const auto& [n, m, r] : shapes) {
    for (int flags = 0; flags < 12; ++flags) {
      const Onto onto = Onto(flags / 4);
      const bool usable = flags & 1;
      const int threads = flags & 2 ? 64 : 1;  // blocks of pairs, or whole ones
      pair_of<double, double>(DType::f64, DType::f64, n, m, r, onto, usable, threads, random);
      pair_of<float, float>(DType::f32, DType::f32, n, m, r, onto, usable, threads, random);
      pair_of<bf16, float>(DType::bf16, DType::f32, n, m, r, onto, usable, threads, random);
      pair_of<f16, float>(DType::f16, DType::f32, n, m, r, onto, usable, threads, random);
    }
  }
  std::printf("adamw (%s): 1 passed, 0 failed\n", cpu::kernels().name);
}
