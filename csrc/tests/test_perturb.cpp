// The CPU stages without torch: every instruction set that runs here against the plain formula
// E_B = c [G_B A^+ A^+T + ...] of well-conditioned factors, and the bad cases that must not crash.
#include <limits>

#include "../cpu/perturb.h"
#include "examples.h"

using namespace eflat;

namespace {

void serially(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = count - 1; i >= 0; --i) body(i);  // the order must not matter
}

void agrees_with_the_formula(std::mt19937& random) {
  const Shape shapes[] = {{1, 1, 1},     {5, 4, 2},      {40, 30, 7},
                          {33, 700, 16}, {1100, 50, 20}, {90, 80, 40}};
  for (const Shape& shape : shapes) {
    for (bool onto_B : {true, false}) {
      const int threads = onto_B ? 1 : 64;  // whole pairs, or blocks of them
      const Example x(shape, random);
      Values E(DType::f64, x.target_size(onto_B));
      const Pair pair = x.pair(onto_B, E);
      double norm = NAN, expected_norm;
      CHECK(cpu::perturb({&pair, 1, 0.1, false, {}, DType::f64}, &norm, serially, threads) == 0,
            "nothing to skip");
      const Matrix expected = x.expected(onto_B, 0.1, &expected_norm);
      const double error = relative_error(E.matrix(), expected);
      CHECK(error < 1e-9, "%d %d %d: E is off by %g", shape.n, shape.m, shape.r, error);
      CHECK(E.guards_intact(), "%d %d %d", shape.n, shape.m, shape.r);
      CHECK(std::fabs(norm / expected_norm - 1) < 1e-9, "norm %g, expected %g", norm,
            expected_norm);
    }
  }
}

void bad_values_leave_others_alone(std::mt19937& random, int threads) {
  for (double bad : {double(NAN), double(INFINITY), 0.0}) {
    Example good({30, 20, 4}, random), other({30, 20, 4}, random);
    if (bad == 0) {
      other.grad_A = Values(DType::f64, Matrix(4 * 20, 0.0));
      other.grad_B = Values(DType::f64, Matrix(30 * 4, 0.0));
    } else {
      other.B.set(7, bad);
    }
    Values E(DType::f64, 30 * 4), other_E(DType::f64, 30 * 4);
    const Pair pairs[] = {good.pair(true, E), other.pair(true, other_E)};
    double norms[2] = {NAN, NAN};
    CHECK(cpu::perturb({pairs, 2, 0.1, true, {}, DType::f64}, norms, serially, threads) == 1,
          "one is skipped");
    double expected_norm;
    CHECK(relative_error(E.matrix(), good.expected(true, 0.1, &expected_norm)) < 1e-9, "good");
    for (double e : other_E.matrix()) CHECK(e == 0, "E of the bad layer is %g", e);
    CHECK(!usable(norms[1]), "norm %g", norms[1]);
  }
}

}  // namespace

int main() {
  std::mt19937 random(std::random_device{}());
  agrees_with_the_formula(random);
  for (int threads : {1, 64}) bad_values_leave_others_alone(random, threads);
  std::printf("perturb (%s): 1 passed, 0 failed\n", cpu::kernels().name);
}
