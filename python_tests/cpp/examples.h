// Random LoRA pairs for the C++ tests, and what the paper's formula says of them.
#pragma once
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/core/pairs.h"
#include "check.h"

namespace eflat {

using Matrix = std::vector<double>;  // row-major

inline Matrix times(const Matrix& x, const Matrix& y, int p, int q, int r, bool x_t = false,
                    bool y_t = false) {
  Matrix out(p * r, 0.0);
  for (int i = 0; i < p; ++i)
    for (int j = 0; j < r; ++j)
      for (int k = 0; k < q; ++k)
        out[i * r + j] += (x_t ? x[k * p + i] : x[i * q + k]) * (y_t ? y[j * q + k] : y[k * r + j]);
  return out;
}

// Gauss-Jordan; for well-conditioned matrices.
inline Matrix inverse(Matrix m, int r) {
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

inline Matrix random_matrix(int rows, int columns, std::mt19937& random) {
  std::normal_distribution<double> normal;
  Matrix x(rows * columns);
  for (double& e : x) e = normal(random);
  return x;
}

// Singular values from 1 down to about 1 / condition.
inline Matrix random_matrix(int rows, int r, double condition, std::mt19937& random) {
  Matrix x = random_matrix(rows, r, random);
  if (condition == 1 || r == 1) return x;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < r; ++j) x[i * r + j] *= std::pow(condition, -double(j) / (r - 1));
  Matrix mix = random_matrix(r, r, random);  // well-conditioned: the identity and a bit
  for (int i = 0; i < r * r; ++i) mix[i] = mix[i] / (3 * std::sqrt(r)) + (i % (r + 1) == 0);
  return times(x, mix, rows, r, r);
}

inline double norm_of(const Matrix& x) {
  double square = 0;
  for (double e : x) square += e * e;
  return std::sqrt(square);
}

// ||x - y|| relative to ||y||, or to `least` where that is larger.
inline double relative_error(Matrix x, const Matrix& y, double least = 0) {
  for (size_t i = 0; i < y.size(); ++i) x[i] -= y[i];
  const double difference = norm_of(x);
  return difference == 0 ? 0 : difference / std::fmax(norm_of(y), least);
}

// Elements of any type, poisoned with NaN, between guards that show whether neighbours were
// written. What is not finite in the type stays so.
class Values {
 public:
  Values(DType dtype, size_t count)
      : dtype_(dtype), count_(count), bytes_(2 * kGuard + count * size_of(dtype), kGuardByte) {
    std::memset(data(), 0xff, count * size_of(dtype));
  }
  Values(DType dtype, const Matrix& x) : Values(dtype, x.size()) {
    for (size_t i = 0; i < x.size(); ++i) set(i, x[i]);
  }

  void* data() { return bytes_.data() + kGuard; }
  const void* data() const { return bytes_.data() + kGuard; }
  DType dtype() const { return dtype_; }
  size_t size() const { return count_; }

  double operator[](size_t i) const {
    switch (dtype_) {
      case DType::f64:
        return at<double>(i);
      case DType::f32:
        return at<float>(i);
      case DType::bf16:
        return at<bf16>(i);
      default:
        return at<f16>(i);
    }
  }
  void set(size_t i, double x) {
    switch (dtype_) {
      case DType::f64:
        return put<double>(i, x);
      case DType::f32:
        return put<float>(i, x);
      case DType::bf16:
        return put<bf16>(i, x);
      default:
        return put<f16>(i, x);
    }
  }
  Matrix matrix() const {
    Matrix x(count_);
    for (size_t i = 0; i < count_; ++i) x[i] = (*this)[i];
    return x;
  }
  bool guards_intact() const {
    for (size_t i = 0; i < kGuard; ++i)
      if (bytes_[i] != kGuardByte || bytes_[bytes_.size() - 1 - i] != kGuardByte) return false;
    return true;
  }
  bool operator==(const Values& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr unsigned char kGuardByte = 0xa5;

  template <class T>
  double at(size_t i) const {
    return to_double(static_cast<const T*>(data())[i]);
  }
  template <class T>
  void put(size_t i, double x) {
    static_cast<T*>(data())[i] = from_double<T>(x);
  }

  DType dtype_;
  size_t count_;
  std::vector<unsigned char> bytes_;
};

enum class Onto { B, A, both };  // onto both, B is the target

inline const char* name_of(Onto onto) {
  return onto == Onto::B ? "onto B" : onto == Onto::A ? "onto A" : "onto both";
}

struct Shape {
  int n, m, r;
  DType dtype = DType::f64;
  double condition_A = 1, condition_B = 1;
};

struct Example {
  Shape shape;
  Values A, B, grad_A, grad_B;
  double scaling = 2;

  Example(const Shape& shape, std::mt19937& random)
      : shape(shape),
        A(shape.dtype,
          transposed(random_matrix(shape.m, shape.r, shape.condition_A, random), shape.m, shape.r)),
        B(shape.dtype, random_matrix(shape.n, shape.r, shape.condition_B, random)),
        grad_A(shape.dtype, random_matrix(shape.r, shape.m, random)),
        grad_B(shape.dtype, random_matrix(shape.n, shape.r, random)) {}

  size_t target_size(Onto onto) const { return (onto == Onto::A ? A : B).size(); }

  // out_other: for A, onto both.
  Pair pair(Onto onto, Values& out, Values* out_other = nullptr) const {
    const bool onto_B = onto != Onto::A, both = onto == Onto::both;
    CHECK(out.size() == target_size(onto), "%zu elements", out.size());
    CHECK(!both || out_other->size() == A.size(), "%zu elements", out_other->size());
    Side side_A{A.data(), grad_A.data(), shape.m, true};
    Side side_B{B.data(), grad_B.data(), shape.n, false};
    (onto_B ? side_B : side_A).out = out.data();
    if (both) side_A.out = out_other->data();
    const double rtol = shape.dtype == DType::f64 ? 1e-7 : 1e-5;
    return {onto_B ? side_B : side_A,
            onto_B ? side_A : side_B,
            shape.r,
            shape.dtype,
            scaling,
            rtol,
            out.dtype()};
  }

  // The example as it is where `added_A` and `added_B` (null: nothing) were added to its factors.
  Example at_the_point(const Values* added_A, const Values* added_B) const {
    Example x = *this;
    for (auto [factor, added] : {std::pair(&x.A, added_A), std::pair(&x.B, added_B)}) {
      for (size_t i = 0; added && i < factor->size(); ++i) {
        const double f = (*factor)[i], e = (*added)[i];
        factor->set(i, shape.dtype == DType::f64 ? f + e : double(float(f) + float(e)));
      }
    }
    return x;
  }

  // The norm of E that carries a perturbation of size rho alone is at least this.
  double least_size(bool of_B, double rho) const {
    const double size = norm_of((of_B ? A : B).matrix());
    return size > 0 ? rho / (scaling * size) : 0;
  }

  // Equations (1)-(3) for factors of full rank.
  Matrix expected(bool onto_B, double rho, double* norm) const {
    const auto [n, m, r, dtype, condition_A, condition_B] = shape;
    const Matrix pinv_A = inverse_of_A(), pinv_B = inverse_of_B();
    Matrix G = times(grad_B.matrix(), pinv_A, n, r, m, false, true);
    const Matrix second = times(pinv_B, grad_A.matrix(), n, r, m, true);
    for (int i = 0; i < n * m; ++i) G[i] = (G[i] + second[i]) / (2 * scaling);
    *norm = norm_of(G);
    for (double& g : G) g *= rho / (*norm * scaling);
    return onto_B ? times(G, pinv_A, n, m, r) : times(pinv_B, G, r, n, m);
  }

  struct Both {
    Matrix E_B, E_A;
    double norm;
  };

  // s P = (1 - B B^+) G_B (A^T)^+ + (B^T)^+ G_A, the two terms of which become E_B and E_A; or B
  // alone, where their product is too large.
  Both expected_onto_both(double rho) const {
    const auto [n, m, r, dtype, condition_A, condition_B] = shape;
    const Matrix pinv_A = inverse_of_A(), pinv_B = inverse_of_B();
    const Matrix G_B = grad_B.matrix();
    Matrix rest = times(B.matrix(), times(pinv_B, G_B, r, n, r), n, r, r);
    for (int i = 0; i < n * r; ++i) rest[i] = G_B[i] - rest[i];
    const Matrix of_B = times(rest, pinv_A, n, r, m, false, true),
                 of_A = times(pinv_B, grad_A.matrix(), n, r, m, true);
    Matrix P = of_B;
    for (int i = 0; i < n * m; ++i) P[i] += of_A[i];
    Both result = scaled(times(of_B, pinv_A, n, m, r), times(pinv_B, of_A, r, n, m), P, rho);
    if (scaling * norm_of(times(result.E_B, result.E_A, n, r, m)) <= rho / 2) return result;
    P = times(G_B, pinv_A, n, r, m, false, true);
    return scaled(times(P, pinv_A, n, m, r), Matrix(r * m, 0.0), P, rho);
  }

 private:
  // A^+ = A^T (A A^T)^-1, (m, r), and B^+ = (B^T B)^-1 B^T, (r, n).
  Matrix inverse_of_A() const {
    const auto [n, m, r, dtype, condition_A, condition_B] = shape;
    const Matrix a = A.matrix();
    return times(a, inverse(times(a, a, r, m, r, false, true), r), m, r, r, true);
  }
  Matrix inverse_of_B() const {
    const auto [n, m, r, dtype, condition_A, condition_B] = shape;
    const Matrix b = B.matrix();
    return times(inverse(times(b, b, r, n, r, true), r), b, r, r, n, false, true);
  }

  Both scaled(Matrix E_B, Matrix E_A, const Matrix& scaled_P, double rho) const {
    const double norm = norm_of(scaled_P) / scaling, c = rho / (scaling * scaling * norm);
    for (Matrix* E : {&E_B, &E_A})
      for (double& e : *E) e *= c;
    return {E_B, E_A, norm};
  }

  static Matrix transposed(const Matrix& x, int rows, int columns) {
    Matrix y(x.size());
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) y[j * rows + i] = x[i * columns + j];
    return y;
  }
};

}  // namespace eflat
