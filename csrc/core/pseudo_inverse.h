// M^+ for the r x r Gram matrix M = X^T X of a factor X, and the change of basis that keeps the
// rest of the algebra accurate where X is ill-conditioned.
//
// A Gram matrix has the square of its factor's condition number: M alone gives M^+ to
// eps64 cond^2, and the products of one side's M^+ with the other's lose eps64 cond_A cond_B. That
// is enough for most pairs. Where it is not, factors and gradients are read once more in better
// bases. With R^T R = M, nearly, and T = R^-1, the columns of X T are nearly orthonormal, and so
// are all Gram matrices of the pair well-conditioned when its sides are taken as
//
//     [ X_t T_t | G_t T_o ]   and   [ X_o T_o | G_o T_t ]
//
// (the idea of CholeskyQR2). The second M corrects R to eps64 cond and settles which directions
// are above the cutoff when the cutoff is near the rounding of the first. A small multiple of the
// identity is added to the first M, so that R is invertible also where M is not.
#pragma once
#include "small_matrix.h"

namespace eflat {
inline namespace EFLAT_TARGET {

// The largest rounding error, relative to M^+, without a second pass over the pair.
EFLAT_HD double inversion_tolerance(DType dtype) { return dtype == DType::f64 ? 1e-12 : 1e-8; }

EFLAT_HD double largest_of(int k, const double* values) {
  double largest = 0;
  for (int p = 0; p < k; ++p) largest = values[p] > largest ? values[p] : largest;
  return largest;
}

// inverse = M^+ for rows^T rows = M + shift, rows orthogonal with squared norms `eigenvalues`,
// over the eigenvalues of M above rtol^2 * largest. work: r^2.
template <class Team>
EFLAT_HD void truncated_inverse(const Team& team, int k, int r, double shift, double rtol,
                                const double* rows, const double* eigenvalues, double* inverse,
                                double* work) {
  const double largest = largest_of(k, eigenvalues) - shift;
  int kept = 0;
  for (int p = 0; p < k; ++p) {
    const double value = eigenvalues[p] - shift;
    if (!(value > rtol * rtol * largest)) continue;
    const double f = 1 / (sqrt(eigenvalues[p]) * sqrt(value));
    if (kept % team.rows() == team.row())
      for (int j = team.lane(); j < r; j += team.lanes()) work[kept * r + j] = f * rows[p * r + j];
    ++kept;
  }
  team.sync();
  gram_of_rows(team, kept, r, work, inverse);
}

// First pass. M: (r, r); inverse: out, M^+; R, T: out, (r, r), R T = 1. Returns whether a second
// pass is needed; where it is not, R and T are not written.
// work: 2 r^2 + 2 r.
template <class Team>
EFLAT_HD bool invert_gram(const Team& team, int r, const double* M, double rtol, DType dtype,
                          double* inverse, double* R, double* T, double* work) {
  const double precise = inversion_tolerance(dtype) / kEps64, above_cutoff = 0.25 / (rtol * rtol);
  const double limit = precise < above_cutoff ? precise : above_cutoff;
  if (inverse_if_well_conditioned(team, r, M, limit, inverse, work)) return false;
  team.sync();
  double* shifted = work;
  double* rows = work + r * r;
  double* eigenvalues = work + 2 * r * r;
  double shift = 0;
  for (int j = 0; j < r; ++j) shift += 16 * kEps64 * M[j * r + j];
  for (int e = thread_of(team); e < r * r; e += threads_of(team))
    shifted[e] = M[e] + (e % (r + 1) == 0 ? shift : 0);
  team.sync();
  const int k = pivoted_cholesky(team, r, shifted, r, rows, eigenvalues + r);
  orthogonalise_rows(team, k, r, rows, eigenvalues);
  const double largest = largest_of(k, eigenvalues) - shift;
  double smallest = largest;  // that counts, or that might after correction
  for (int p = 0; p < k; ++p) {
    const double value = eigenvalues[p] - shift;
    if (value > 0.25 * rtol * rtol * largest && value < smallest) smallest = value;
  }
  truncated_inverse(team, k, r, shift, rtol, rows, eigenvalues, inverse, shifted);
  // k < r: the factor is zero or not finite.
  const bool again = k == r && largest * kEps64 > inversion_tolerance(dtype) * smallest;
  if (!again) return false;
  for (int p = team.row(); p < r; p += team.rows()) {
    for (int j = team.lane(); j < r; j += team.lanes()) {
      R[p * r + j] = rows[p * r + j];
      T[j * r + p] = rows[p * r + j] / eigenvalues[p];
    }
  }
  team.sync();
  return true;
}

// The bases of a side that is not why its pair needs a second pass.
template <class Team>
EFLAT_HD void identity_bases(const Team& team, int r, double* R, double* T) {
  for (int e = thread_of(team); e < r * r; e += threads_of(team)) R[e] = T[e] = e % (r + 1) == 0;
  team.sync();
}

// After the second pass. second: (2r, 2r), the Gram matrix of [X T | ...]; again: as invert_gram
// returned for this side; inverse: M^+ of the first pass, replaced by that in the basis T.
// work: 2 r^2 + 2 r.
template <class Team>
EFLAT_HD void correct_inverse(const Team& team, int r, bool again, const double* second,
                              double rtol, const double* R, double* inverse, double* work) {
  if (!again) return;  // T is the identity
  double* root = work;
  double* corrected = work + r * r;  // corrected^T corrected = X^T X
  double* eigenvalues = work + 2 * r * r;
  const int rank = pivoted_cholesky(team, r, second, 2 * r, root, eigenvalues + r);
  multiply(team, rank, r, r, root, R, corrected);
  orthogonalise_rows(team, rank, r, corrected, eigenvalues);
  // R M^+ R^T, from its roots: M^+ itself would lose cond^2 here.
  const double largest = largest_of(rank, eigenvalues);
  double* kept_rows = work;
  int kept = 0;
  for (int p = 0; p < rank; ++p) {
    if (!(eigenvalues[p] > rtol * rtol * largest)) continue;
    if (kept % team.rows() == team.row()) {
      for (int j = team.lane(); j < r; j += team.lanes()) {
        double sum = 0;
        for (int i = 0; i < r; ++i) sum += corrected[p * r + i] * R[j * r + i];
        kept_rows[kept * r + j] = sum / eigenvalues[p];
      }
    }
    ++kept;
  }
  team.sync();
  gram_of_rows(team, kept, r, kept_rows, inverse);
}

}  // namespace EFLAT_TARGET
}  // namespace eflat
