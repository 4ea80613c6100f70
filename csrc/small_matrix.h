// r x r mathematics in float64, row-major, for one group of cooperating threads.
//
// The same code runs on the CPU by one thread (SerialTeam) and on the GPU by one warp. A Team has
//   lane(), lanes()  this thread's number and how many there are: loops over columns are strided
//   sync()           what the others have written is visible afterwards
//   sum(x)           the sum of x over the threads, the same value in all of them
// so that results do not depend on anything but the number of lanes.
//
// Compiled once per instruction set, hence the inline namespace.
#pragma once
#include <math.h>

#include "dtypes.h"

#ifndef EFLAT_TARGET
#define EFLAT_TARGET generic
#endif

#if defined(__CUDACC__)
#define EFLAT_SUM_OVER(...)
#else
#define EFLAT_PRAGMA(x) _Pragma(#x)
// float64 sums may be split over vector lanes (-fopenmp-simd)
#define EFLAT_SUM_OVER(...) EFLAT_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#endif

namespace eflat {
inline namespace EFLAT_TARGET {

constexpr double kEps64 = 2.220446049250313e-16;

struct SerialTeam {
  static constexpr int lane() { return 0; }
  static constexpr int lanes() { return 1; }
  static void sync() {}
  static double sum(double x) { return x; }
};

// Sum of x[i] * y[i].
template <class Team>
EFLAT_HD double dot(const Team& team, int n, const double* x, const double* y) {
  double s = 0;
  EFLAT_SUM_OVER(s)
  for (int i = team.lane(); i < n; i += team.lanes()) s += x[i] * y[i];
  return team.sum(s);
}

// out (p, r) = x (p, q) * y (q, r).
template <class Team>
EFLAT_HD void multiply(const Team& team, int p, int q, int r, const double* x, const double* y,
                       double* out) {
  for (int i = 0; i < p; ++i) {
    double* row = out + i * r;
    for (int j = team.lane(); j < r; j += team.lanes()) row[j] = 0;
    for (int k = 0; k < q; ++k) {
      const double f = x[i * q + k];
      const double* yk = y + k * r;
      for (int j = team.lane(); j < r; j += team.lanes()) row[j] += f * yk[j];
    }
  }
  team.sync();
}

// out (p, r) = x (p, q) * y^T, y (r, q).
template <class Team>
EFLAT_HD void multiply_transposed(const Team& team, int p, int q, int r, const double* x,
                                  const double* y, double* out) {
  for (int i = 0; i < p; ++i) {
    for (int j = team.lane(); j < r; j += team.lanes()) {
      double sum = 0;
      for (int k = 0; k < q; ++k) sum += x[i * q + k] * y[j * q + k];
      out[i * r + j] = sum;
    }
  }
  team.sync();
}

template <class Team>
EFLAT_HD void copy(const Team& team, int n, const double* x, double* out) {
  for (int e = team.lane(); e < n; e += team.lanes()) out[e] = x[e];
  team.sync();
}

// out (r, r) = x^T x for x of shape (p, r).
template <class Team>
EFLAT_HD void gram_of_rows(const Team& team, int p, int r, const double* x, double* out) {
  for (int i = 0; i < r; ++i) {
    double* row = out + i * r;
    for (int j = team.lane(); j < r; j += team.lanes()) row[j] = 0;
    for (int k = 0; k < p; ++k) {
      const double f = x[k * r + i];
      for (int j = team.lane(); j < r; j += team.lanes()) row[j] += f * x[k * r + j];
    }
  }
  team.sync();
}

// inverse = M^-1 by Cholesky, accepted when ||M||_F ||M^-1||_F <= limit: since that product is at
// least the condition number, acceptance proves that no eigenvalue is below ||M|| / limit (the
// pivots alone would prove nothing). Returns false, with `inverse` undefined, otherwise.
// work: 2 r^2.
template <class Team>
EFLAT_HD bool inverse_if_well_conditioned(const Team& team, int r, const double* M, double limit,
                                          double* inverse, double* work) {
  double* U = work;          // M = U^T U
  double* Y = work + r * r;  // U^-T
  for (int e = team.lane(); e < r * r; e += team.lanes()) U[e] = M[e];
  team.sync();
  for (int k = 0; k < r; ++k) {
    const double pivot = U[k * r + k];
    if (!(pivot > 0)) return false;
    const double f = 1 / sqrt(pivot);
    team.sync();
    for (int j = k + team.lane(); j < r; j += team.lanes()) U[k * r + j] *= f;
    team.sync();
    for (int i = k + 1; i < r; ++i) {
      const double u = U[k * r + i];
      for (int j = i + team.lane(); j < r; j += team.lanes()) U[i * r + j] -= u * U[k * r + j];
    }
    team.sync();
  }
  for (int i = 0; i < r; ++i) {
    double* row = Y + i * r;
    for (int j = team.lane(); j < r; j += team.lanes()) row[j] = j == i;
    for (int k = 0; k < i; ++k) {
      const double u = U[k * r + i];
      for (int j = team.lane(); j <= k; j += team.lanes()) row[j] -= u * Y[k * r + j];
    }
    const double f = 1 / U[i * r + i];
    for (int j = team.lane(); j <= i; j += team.lanes()) row[j] *= f;
  }
  team.sync();
  gram_of_rows(team, r, r, Y, inverse);
  const double size = sqrt(dot(team, r * r, M, M)) * sqrt(dot(team, r * r, inverse, inverse));
  return size <= limit;
}

// rows (k, r) with M = rows^T rows, by Cholesky with the largest remaining pivot first; returns k.
// Stops where what remains is rounding. work: r.
template <class Team>
EFLAT_HD int pivoted_cholesky(const Team& team, int r, const double* M, double* rows,
                              double* work) {
  double* diagonal = work;  // of what remains; -1 once chosen
  for (int j = team.lane(); j < r; j += team.lanes()) diagonal[j] = M[j * r + j];
  team.sync();
  double first = 0;
  int k = 0;
  for (; k < r; ++k) {
    int p = 0;
    for (int j = 1; j < r; ++j) p = diagonal[j] > diagonal[p] ? j : p;
    const double pivot = diagonal[p];
    if (k == 0) first = pivot;
    if (!(pivot > kEps64 * first)) break;
    team.sync();
    double* row = rows + k * r;
    for (int j = team.lane(); j < r; j += team.lanes()) row[j] = M[p * r + j];
    for (int i = 0; i < k; ++i) {
      const double f = rows[i * r + p];
      for (int j = team.lane(); j < r; j += team.lanes()) row[j] -= f * rows[i * r + j];
    }
    const double f = 1 / sqrt(pivot);
    for (int j = team.lane(); j < r; j += team.lanes()) {
      if (j == p) {
        row[j] = sqrt(pivot);
        diagonal[j] = -1;
      } else if (diagonal[j] < 0) {
        row[j] = 0;
      } else {
        row[j] *= f;
        const double rest = diagonal[j] - row[j] * row[j];
        diagonal[j] = rest > 0 ? rest : 0;
      }
    }
    team.sync();
  }
  return k;
}

// One-sided Jacobi: rotates the k rows of length r until they are orthogonal. rows^T rows stays as
// it is, so its eigenvectors are the rows and its eigenvalues their squared norms, written to
// `eigenvalues`. Rows sorted by norm, as pivoted Cholesky leaves them, take few sweeps.
template <class Team>
EFLAT_HD void orthogonalise_rows(const Team& team, int k, int r, double* rows,
                                 double* eigenvalues) {
  constexpr int kMaxSweeps = 40;
  const double tolerance =
      (4 + 2 * sqrt(double(r))) * kEps64;  // above the rounding of a dot product
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kMaxSweeps; ++sweep) {
    rotated = false;
    for (int p = 0; p < k; ++p) {
      for (int q = p + 1; q < k; ++q) {
        double* x = rows + p * r;
        double* y = rows + q * r;
        double xx = 0, yy = 0, xy = 0;
        EFLAT_SUM_OVER(xx, yy, xy)
        for (int j = team.lane(); j < r; j += team.lanes()) {
          xx += x[j] * x[j];
          yy += y[j] * y[j];
          xy += x[j] * y[j];
        }
        xx = team.sum(xx);
        yy = team.sum(yy);
        xy = team.sum(xy);
        if (!(fabs(xy) > tolerance * sqrt(xx) * sqrt(yy))) continue;
        rotated = true;
        const double zeta = (yy - xx) / (2 * xy);
        const double t = copysign(1 / (fabs(zeta) + sqrt(1 + zeta * zeta)), zeta);
        const double c = 1 / sqrt(1 + t * t), s = c * t;
        for (int j = team.lane(); j < r; j += team.lanes()) {
          const double a = x[j], b = y[j];
          x[j] = c * a - s * b;
          y[j] = s * a + c * b;
        }
      }
    }
  }
  team.sync();
  for (int p = 0; p < k; ++p) {
    const double norm = dot(team, r, rows + p * r, rows + p * r);
    if (team.lane() == 0) eigenvalues[p] = norm;
  }
  team.sync();
}

}  // namespace EFLAT_TARGET
}  // namespace eflat
