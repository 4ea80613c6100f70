// The CPU stages without torch: every instruction set that runs here against the plain formula
// E_B = c [G_B A^+ A^+T + ...] of well-conditioned factors, and the bad cases that must not crash.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../cpu/perturb.h"
#include "check.h"

using namespace eflat;

namespace {

using Matrix = std::vector<double>;  // row-major

void serially(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = count - 1; i >= 0; --i) body(i);  // the order must not matter
}

Matrix times(const Matrix& x, const Matrix& y, int p, int q, int r, bool x_t = false,
             bool y_t = false) {
  Matrix out(p * r, 0.0);
  for (int i = 0; i < p; ++i)
    for (int j = 0; j < r; ++j)
      for (int k = 0; k < q; ++k)
        out[i * r + j] += (x_t ? x[k * p + i] : x[i * q + k]) * (y_t ? y[j * q + k] : y[k * r + j]);
  return out;
}

// Gauss-Jordan; for the well-conditioned matrices of this test.
Matrix inverse(Matrix m, int r) {
  Matrix out(r * r, 0.0);
  for (int i = 0; i < r; ++i) out[i * r + i] = 1;
  for (int k = 0; k < r; ++k) {
    const double pivot = m[k * r + k];
    for (int j = 0; j < r; ++j) m[k * r + j] /= pivot, out[k * r + j] /= pivot;
    for (int i = 0; i < r; ++i) {
      if (i == k) continue;
      const double f = m[i * r + k];
      for (int j = 0; j < r; ++j) {
        m[i * r + j] -= f * m[k * r + j];
        out[i * r + j] -= f * out[k * r + j];
      }
    }
  }
  return out;
}

struct Example {
  int n, m, r;
  Matrix A, B, grad_A, grad_B, E;

  Example(int n, int m, int r, std::mt19937& random) : n(n), m(m), r(r), E(n * r, NAN) {
    std::normal_distribution<double> normal;
    for (Matrix* x : {&A, &grad_A}) x->resize(r * m);
    for (Matrix* x : {&B, &grad_B}) x->resize(n * r);
    for (Matrix* x : {&A, &B, &grad_A, &grad_B})
      for (double& e : *x) e = normal(random);
  }

  Pair pair(bool onto_B) {
    const Side side_A{A.data(), grad_A.data(), m, true}, side_B{B.data(), grad_B.data(), n, false};
    E.assign(onto_B ? n * r : r * m, NAN);
    return {onto_B ? side_B : side_A,
            onto_B ? side_A : side_B,
            r,
            DType::f64,
            2.0,
            1e-7,
            E.data(),
            DType::f64,
            nullptr};
  }

  // Equations (1)-(3) for factors of full rank: A^+ = A^T (A A^T)^-1, B^+ = (B^T B)^-1 B^T.
  Matrix expected(bool onto_B, double scaling, double rho, double* norm) const {
    const Matrix pinv_A = times(A, inverse(times(A, A, r, m, r, false, true), r), m, r, r, true);
    const Matrix pinv_B = times(inverse(times(B, B, r, n, r, true), r), B, r, r, n, false, true);
    Matrix G = times(grad_B, pinv_A, n, r, m, false, true);
    const Matrix second = times(pinv_B, grad_A, n, r, m, true);
    double square = 0;
    for (int i = 0; i < n * m; ++i) {
      G[i] = (G[i] + second[i]) / (2 * scaling);
      square += G[i] * G[i];
    }
    *norm = std::sqrt(square);
    for (double& g : G) g *= rho / (*norm * scaling);
    return onto_B ? times(G, pinv_A, n, m, r) : times(pinv_B, G, r, n, m);
  }
};

double relative_error(const Matrix& x, const Matrix& y) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    difference += (x[i] - y[i]) * (x[i] - y[i]);
    size += y[i] * y[i];
  }
  return std::sqrt(difference / size);
}

void agrees_with_the_formula(std::mt19937& random) {
  const int shapes[][3] = {{1, 1, 1},     {5, 4, 2},      {40, 30, 7},
                           {33, 700, 16}, {1100, 50, 20}, {90, 80, 40}};
  for (const auto& [n, m, r] : shapes) {
    for (bool onto_B : {true, false}) {
      const int threads = onto_B ? 1 : 64;  // whole pairs, or blocks of them
      Example x(n, m, r, random);
      const Pair pair = x.pair(onto_B);
      double norm = NAN, expected_norm;
      CHECK(cpu::perturb({&pair, 1, 0.1, false, {}, DType::f64}, &norm, serially, threads) == 0,
            "nothing to skip");
      const Matrix expected = x.expected(onto_B, 2.0, 0.1, &expected_norm);
      const double error = relative_error(x.E, expected);
      CHECK(error < 1e-9, "%d %d %d: E is off by %g", n, m, r, error);
      CHECK(std::fabs(norm / expected_norm - 1) < 1e-9, "norm %g, expected %g", norm,
            expected_norm);
    }
  }
}

void bad_values_leave_others_alone(std::mt19937& random, int threads) {
  for (double bad : {double(NAN), double(INFINITY), 0.0}) {
    Example good(30, 20, 4, random), other(30, 20, 4, random);
    if (bad == 0) {
      other.grad_A.assign(other.grad_A.size(), 0);
      other.grad_B.assign(other.grad_B.size(), 0);
    } else {
      other.B[7] = bad;
    }
    const Pair pairs[] = {good.pair(true), other.pair(true)};
    double norms[2] = {NAN, NAN};
    CHECK(cpu::perturb({pairs, 2, 0.1, true, {}, DType::f64}, norms, serially, threads) == 1,
          "one is skipped");
    double expected_norm;
    CHECK(relative_error(good.E, good.expected(true, 2.0, 0.1, &expected_norm)) < 1e-9, "good");
    for (double e : other.E) CHECK(e == 0, "E of the bad layer is %g", e);
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
