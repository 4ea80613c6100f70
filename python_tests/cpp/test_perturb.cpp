// The CPU stages without torch: every instruction set that runs here against the plain formula
// E_B = c [G_B A^+ A^+T + ...] of well-conditioned factors, onto both factors, too, and the bad
// cases that must not crash.
#include <limits>

#include "../../csrc/cpu/perturb.h"
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
      const Onto onto = onto_B ? Onto::B : Onto::A;
      Values E(DType::f64, x.target_size(onto));
      const Pair pair = x.pair(onto, E);
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

void agrees_with_the_formula_onto_both(std::mt19937& random) {
  const Shape shapes[] = {{1, 1, 1}, {5, 4, 2}, {40, 30, 7}, {33, 700, 16}, {1100, 50, 20}};
  for (const Shape& shape : shapes) {
    // While B and with it the gradient of A are small, B alone is perturbed, unless its gradient
    // is all in B's column space.
    for (double size_of_B : {1.0, 1e-7}) {
      Example x(shape, random);
      for (Values* values : {&x.B, &x.grad_A})
        for (size_t i = 0; i < values->size(); ++i) values->set(i, size_of_B * (*values)[i]);
      Values E_B(DType::f64, x.B.size()), E_A(DType::f64, x.A.size());
      const Pair pair = x.pair(Onto::both, E_B, &E_A);
      double norm = NAN;
      const int threads = size_of_B == 1 ? 1 : 64;
      CHECK(cpu::perturb({&pair, 1, 0.1, false, {}, DType::f64}, &norm, serially, threads) == 0,
            "nothing to skip");
      const Example::Both expected = x.expected_onto_both(0.1);
      const bool alone = norm_of(expected.E_A) == 0;
      CHECK(alone == (size_of_B < 1 && shape.n > shape.r), "%d: what is tested", shape.n);
      CHECK(std::fabs(norm / expected.norm - 1) < 1e-9, "norm %g, expected %g", norm,
            expected.norm);
      for (bool of_B : {true, false}) {
        const Values& E = of_B ? E_B : E_A;
        const double error =
            relative_error(E.matrix(), of_B ? expected.E_B : expected.E_A, x.least_size(of_B, 0.1));
        CHECK(error < 1e-9, "%d %d %d: E_%c is off by %g", shape.n, shape.m, shape.r,
              of_B ? 'B' : 'A', error);
        CHECK(E.guards_intact(), "%d %d %d", shape.n, shape.m, shape.r);
      }
    }
  }
}

// Addends of the factors, perhaps the averages themselves, give what factors that hold them give.
void points(std::mt19937& random) {
  const Shape shapes[] = {{1, 1, 1}, {40, 30, 7}, {33, 700, 16}, {1100, 50, 20}, {60, 50, 3}};
  for (Shape shape : shapes) {
    for (int flags = 0; flags < 4 * 3 * 4; ++flags) {
      shape.dtype = DType(flags % 4);
      const Onto onto = Onto(flags / 4 % 3);
      const bool both = onto == Onto::both, is_average = flags / 12 % 2;
      const bool ill_conditioned = flags / 24 % 2;
      if (ill_conditioned) shape.condition_A = shape.condition_B = 1e4;
      const DType wide = added_to(shape.dtype);
      const Example x(shape, random);
      const double size = ill_conditioned ? 1e-6 : 0.1;
      auto values = [&](size_t n) {
        Matrix e = random_matrix(int(n), 1, random);
        for (double& element : e) element *= size;
        return Values(wide, e);
      };
      Values average = values(x.target_size(onto)), average_A = values(x.A.size());
      Values added = is_average ? average : values(average.size());
      Values added_A = is_average ? average_A : values(x.A.size());
      Values expected = average, expected_A = average_A;
      const Example there = x.at_the_point(onto == Onto::B ? nullptr
                                           : both          ? &added_A
                                                           : &added,
                                           onto == Onto::A ? nullptr : &added);
      Pair pairs[] = {there.pair(onto, expected, &expected_A), x.pair(onto, average, &average_A)};
      pairs[1].target.added = is_average ? average.data() : added.data();
      if (both) pairs[1].other.added = is_average ? average_A.data() : added_A.data();
      double norms[2];
      for (int i : {0, 1})
        cpu::perturb({pairs + i, 1, 0.1, false, {true, 0.3}, DType::f64}, norms + i, serially,
                     flags % 2 ? 1 : 64);
      CHECK(norms[0] == norms[1], "%s: norm %g, expected %g", name_of(onto), norms[1], norms[0]);
      CHECK(average == expected && average_A == expected_A, "%s, type %d", name_of(onto),
            int(shape.dtype));
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
    const Pair pairs[] = {good.pair(Onto::B, E), other.pair(Onto::B, other_E)};
    double norms[2] = {NAN, NAN};
    CHECK(cpu::perturb({pairs, 2, 0.1, true, {}, DType::f64}, norms, serially, threads) == 1,
          "one is skipped");
    double expected_norm;
    CHECK(relative_error(E.matrix(), good.expected(true, 0.1, &expected_norm)) < 1e-9, "good");
    for (double e : other_E.matrix()) CHECK(e == 0, "E of the bad layer is %g", e);
    CHECK(!usable(norms[1]), "norm %g", norms[1]);
  }
}

void bad_values_leave_others_alone_onto_both(std::mt19937& random, int threads) {
  for (bool average : {false, true}) {
    Example good({30, 20, 4}, random), other({30, 20, 4}, random);
    other.A.set(5, NAN);
    Values E_B(DType::f64, Matrix(30 * 4, 3.0)), E_A(DType::f64, Matrix(4 * 20, 3.0));
    Values other_B = E_B, other_A = E_A;
    const Pair pairs[] = {good.pair(Onto::both, E_B, &E_A),
                          other.pair(Onto::both, other_B, &other_A)};
    double norms[2] = {NAN, NAN};
    CHECK(cpu::perturb({pairs, 2, 0.1, true, {average, 0.5}, DType::f64}, norms, serially,
                       threads) == 1,
          "one is skipped");
    Example::Both expected = good.expected_onto_both(0.1);
    for (Matrix* E : {&expected.E_B, &expected.E_A})
      for (double& e : *E) e = average ? 1.5 + 0.5 * e : e;
    CHECK(relative_error(E_B.matrix(), expected.E_B) < 1e-9, "good B");
    CHECK(relative_error(E_A.matrix(), expected.E_A) < 1e-9, "good A");
    for (const Values* values : {&other_B, &other_A})
      for (double e : values->matrix()) CHECK(e == (average ? 3 : 0), "E of the bad layer: %g", e);
    CHECK(std::isnan(norms[1]), "norm %g", norms[1]);
  }
}

}  // namespace

int main() {
  std::mt19937 random(std::random_device{}());
  agrees_with_the_formula(random);
  agrees_with_the_formula_onto_both(random);
  points(random);
  for (int threads : {1, 64}) {
    bad_values_leave_others_alone(random, threads);
    bad_values_leave_others_alone_onto_both(random, threads);
  }
  std::printf("perturb (%s): 1 passed, 0 failed\n", cpu::kernels().name);
}
