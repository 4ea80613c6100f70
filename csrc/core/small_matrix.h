// r x r mathematics in float64, row-major, for a team of cooperating threads.
//
// The same code runs on the CPU by one thread (SerialTeam) and on the GPU by a thread block. A Team
// is a grid of threads: rows of a matrix are shared out among its rows, columns among its lanes.
//   lane(), lanes(), row(), rows()   this thread's place, and how many there are
//   sync()      what the others have written is visible afterwards
//   sum(x)      the sum of x over the lanes of this thread's row, the same value in all of them
//   total(x)    the sum of x over all threads, the same value in all of them; synchronises
//   largest(x)  likewise, the largest x
// so that results do not depend on anything but the shape of the team.
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
  EFLAT_HD static constexpr int lane() { return 0; }
  EFLAT_HD static constexpr int lanes() { return 1; }
  EFLAT_HD static constexpr int row() { return 0; }
  EFLAT_HD static constexpr int rows() { return 1; }
  EFLAT_HD static void sync() {}
  EFLAT_HD static double sum(double x) { return x; }
  EFLAT_HD static double total(double x) { return x; }
  EFLAT_HD static double largest(double x) { return x; }
};

// For elements without a row: this thread's number among all.
template <class Team>
EFLAT_HD int thread_of(const Team& team) {
  return team.row() * team.lanes() + team.lane();
}
template <class Team>
EFLAT_HD int threads_of(const Team& team) {
  return team.rows() * team.lanes();
}

// Sum of x[i] * y[i], by all threads.
template <class Team>
EFLAT_HD double dot(const Team& team, int n, const double* x, const double* y) {
  double s = 0;
  const int step = threads_of(team);
  EFLAT_SUM_OVER(s)
  for (int i = thread_of(team); i < n; i += step) s += x[i] * y[i];
  return team.total(s);
}

// out[j] = base[j] + sign * (sum over k < n of weights[k * step] * rows[k * ld + j]) for j < r, by
// the lanes of one row of the team; base may be null.
template <class Team>
EFLAT_HD void combine_rows(const Team& team, int n, int r, const double* weights, int step,
                           const double* rows, int ld, const double* base, double sign,
                           double* out) {
  if constexpr (Team::lanes() == 1) {  // vector operations over j
    for (int j = 0; j < r; ++j) out[j] = base ? base[j] : 0;
    for (int k = 0; k < n; ++k) {
      const double f = sign * weights[k * step];
      const double* row = rows + k * ld;
      for (int j = 0; j < r; ++j) out[j] += f * row[j];
    }
  } else {  // a register per column
    for (int j = team.lane(); j < r; j += team.lanes()) {
      double sum = 0;
      for (int k = 0; k < n; ++k) sum += weights[k * step] * rows[k * ld + j];
      out[j] = (base ? base[j] : 0) + sign * sum;
    }
  }
}

// out (p, r) = x (p, q) * y (q, r).
template <class Team>
EFLAT_HD void multiply(const Team& team, int p, int q, int r, const double* x, const double* y,
                       double* out) {
  for (int i = team.row(); i < p; i += team.rows())
    combine_rows(team, q, r, x + i * q, 1, y, r, nullptr, 1, out + i * r);
  team.sync();
}

// out (p, r) = x (p, q) * y^T, y (r, q).
template <class Team>
EFLAT_HD void multiply_transposed(const Team& team, int p, int q, int r, const double* x,
                                  const double* y, double* out) {
  for (int i = team.row(); i < p; i += team.rows()) {
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
  for (int e = thread_of(team); e < n; e += threads_of(team)) out[e] = x[e];
  team.sync();
}

// out (r, r) = x^T x for x of shape (p, r).
template <class Team>
EFLAT_HD void gram_of_rows(const Team& team, int p, int r, const double* x, double* out) {
  for (int i = team.row(); i < r; i += team.rows())
    combine_rows(team, p, r, x + i, r, x, r, nullptr, 1, out + i * r);
  team.sync();
}

// inverse = M^-1 by Cholesky, accepted when ||M||_F ||M^-1||_F <= limit: since that product is at
// least the condition number, acceptance proves that no eigenvalue is below ||M|| / limit (the
// pivots alone would prove nothing). Returns false, with `inverse` undefined, otherwise.
// work: 2 r^2.
template <class Team>
EFLAT_HD bool inverse_if_well_conditioned(const Team& team, int r, const double* M, double limit,
                                          double* inverse, double* work) {
  // Elimination of [M | 1]: its right half becomes D^1/2 L^-1, for M = L L^T and D the pivots.
  for (int i = team.row(); i < r; i += team.rows()) {
    for (int j = team.lane(); j < r; j += team.lanes()) {
      work[i * 2 * r + j] = M[i * r + j];
      work[i * 2 * r + r + j] = i == j;
    }
  }
  team.sync();
  for (int k = 0; k < r; ++k) {
    const double* pivot_row = work + k * 2 * r;
    const double pivot = pivot_row[k];
    if (!(pivot > 0)) return false;
    const double f = 1 / pivot;
    for (int i = k + 1 + team.row(); i < r; i += team.rows()) {
      double* row = work + i * 2 * r;
      const double u = f * pivot_row[i];
      // left of column i all is done, right of r + k all is zero
      for (int j = i + team.lane(); j <= r + k; j += team.lanes()) row[j] -= u * pivot_row[j];
    }
    team.sync();
  }
  double* Y = work + r;  // to be L^-1, triangular, in rows of length 2 r
  for (int k = team.row(); k < r; k += team.rows()) {
    const double f = 1 / sqrt(work[k * 2 * r + k]);
    for (int j = team.lane(); j < r; j += team.lanes()) Y[k * 2 * r + j] *= f;
  }
  team.sync();
  for (int i = team.row(); i < r; i += team.rows()) {
    const double* rows = Y + i * 2 * r;
    combine_rows(team, r - i, r, rows + i, 2 * r, rows, 2 * r, nullptr, 1, inverse + i * r);
  }
  team.sync();
  const double size = sqrt(dot(team, r * r, M, M)) * sqrt(dot(team, r * r, inverse, inverse));
  return size <= limit;
}

// rows (k, r) with M = rows^T rows, by Cholesky with the largest remaining pivot first; returns k.
// Stops where what remains is rounding. M: rows of length ld. work: r.
template <class Team>
EFLAT_HD int pivoted_cholesky(const Team& team, int r, const double* M, int ld, double* rows,
                              double* work) {
  double* diagonal = work;  // of what remains; -1 once chosen
  for (int j = thread_of(team); j < r; j += threads_of(team)) diagonal[j] = M[j * ld + j];
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
    if (team.row() == 0) {
      combine_rows(team, k, r, rows + p, r, rows, r, M + p * ld, -1, row);
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
    }
    team.sync();
  }
  return k;
}

// x and y become orthogonal; xx and yy, their squared norms, follow. Returns whether they were not.
template <class Team>
EFLAT_HD bool rotate_rows(const Team& team, int r, double tolerance, double* x, double* y,
                          double& xx, double& yy) {
  double xy = 0;
  EFLAT_SUM_OVER(xy)
  for (int j = team.lane(); j < r; j += team.lanes()) xy += x[j] * y[j];
  xy = team.sum(xy);
  if (!(fabs(xy) > tolerance * sqrt(xx) * sqrt(yy))) return false;
  const double zeta = (yy - xx) / (2 * xy);
  const double t = copysign(1 / (fabs(zeta) + sqrt(1 + zeta * zeta)), zeta);
  const double c = 1 / sqrt(1 + t * t), s = c * t;
  double new_xx = 0, new_yy = 0;
  EFLAT_SUM_OVER(new_xx, new_yy)
  for (int j = team.lane(); j < r; j += team.lanes()) {
    const double a = c * x[j] - s * y[j], b = s * x[j] + c * y[j];
    x[j] = a;
    y[j] = b;
    new_xx += a * a;
    new_yy += b * b;
  }
  xx = team.sum(new_xx);
  yy = team.sum(new_yy);
  return true;
}

// One-sided Jacobi: rotates the k rows of length r until they are orthogonal. rows^T rows stays as
// it is, so its eigenvectors are the rows and its eigenvalues their squared norms, written to
// `eigenvalues`. A sweep meets all pairs of rows in rounds of pairs without a common row, as in a
// round-robin tournament, so that the rows of a team work at the same time.
template <class Team>
EFLAT_HD void orthogonalise_rows(const Team& team, int k, int r, double* rows,
                                 double* eigenvalues) {
  constexpr int kMaxSweeps = 40;
  const double tolerance =
      (4 + 2 * sqrt(double(r))) * kEps64;  // above the rounding of a dot product
  for (int p = team.row(); p < k; p += team.rows()) {
    double norm = 0;
    EFLAT_SUM_OVER(norm)
    for (int j = team.lane(); j < r; j += team.lanes()) norm += rows[p * r + j] * rows[p * r + j];
    norm = team.sum(norm);
    if (team.lane() == 0) eigenvalues[p] = norm;
  }
  team.sync();
  const int seats = (k + 1) / 2 * 2, others = seats - 1;
  bool rotated = k > 1;
  for (int sweep = 0; rotated && sweep < kMaxSweeps; ++sweep) {
    int rotations = 0;
    for (int round = 0; round < others; ++round) {
      for (int i = team.row(); i < seats / 2; i += team.rows()) {
        const int a = i == 0 ? others : (round + i) % others;
        const int b = (round - i + others) % others;
        const int p = a < b ? a : b, q = a < b ? b : a;
        if (q >= k) continue;  // a seat is empty
        double xx = eigenvalues[p], yy = eigenvalues[q];
        if (!rotate_rows(team, r, tolerance, rows + p * r, rows + q * r, xx, yy)) continue;
        ++rotations;
        if (team.lane() == 0) {
          eigenvalues[p] = xx;
          eigenvalues[q] = yy;
        }
      }
      team.sync();
    }
    rotated = team.total(rotations) > 0;
  }
}

}  // namespace EFLAT_TARGET
}  // namespace eflat
