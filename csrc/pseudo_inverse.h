// M^+ for the r x r Gram matrix M of a factor, as accurate as if the factor itself had been used.
//
// A Gram matrix has the square of its factor's condition number, so M alone gives M^+ to
// eps64 * cond^2. That is enough for most factors. Where it is not, the factor is read once more.
// With R^T R = M, nearly, the Gram matrix of factor * R^-1 is nearly the identity; computed as it
// is, it corrects R to eps64 * cond (the idea of CholeskyQR2), and settles which directions are
// above the cutoff when the cutoff is near the rounding of M. A small multiple of the identity is
// added to M first, so that R is invertible also where M is not.
//
//   invert_gram ── well conditioned ────────────────────────────────► M^+
//        └─ rows, eigenvalues ── accurate enough ── truncated_inverse ► M^+
//                └─ correction_basis ► second pass ► correct_rows ──┘
#pragma once
#include "small_matrix.h"

namespace eflat {

enum class Inversion { done, from_rows, needs_second_pass };

struct InversionState {
  Inversion kind;
  int rank;      // number of rows
  double shift;  // rows^T rows = M + shift
};

inline namespace EFLAT_TARGET {

// What may be lost to rounding before the factor is read again, relative to M^+.
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
    for (int j = team.lane(); j < r; j += team.lanes()) work[kept * r + j] = f * rows[p * r + j];
    ++kept;
  }
  team.sync();
  gram_of_rows(team, kept, r, work, inverse);
}

// First attempt. M: (r, r). On `done`, inverse (r, r) holds M^+. Otherwise rows (rank, r) and
// eigenvalues (rank) hold M's decomposition, to be used as it is or corrected by a second pass.
// work: 2 r^2 + r.
template <class Team>
EFLAT_HD InversionState invert_gram(const Team& team, int r, const double* M, double rtol,
                                    DType dtype, double* inverse, double* rows, double* eigenvalues,
                                    double* work) {
  const double precise = inversion_tolerance(dtype) / kEps64, above_cutoff = 0.25 / (rtol * rtol);
  const double limit = precise < above_cutoff ? precise : above_cutoff;
  if (inverse_if_well_conditioned(team, r, M, limit, inverse, work)) return {Inversion::done, r, 0};
  team.sync();
  double* shifted = work;
  double shift = 0;
  for (int j = 0; j < r; ++j) shift += 4 * kEps64 * M[j * r + j];
  for (int e = team.lane(); e < r * r; e += team.lanes())
    shifted[e] = M[e] + (e % (r + 1) == 0 ? shift : 0);
  team.sync();
  const int k = pivoted_cholesky(team, r, shifted, rows, work + r * r);
  orthogonalise_rows(team, k, r, rows, eigenvalues);
  const double largest = largest_of(k, eigenvalues) - shift;
  double smallest = largest;  // that counts, or that might after correction
  for (int p = 0; p < k; ++p) {
    const double value = eigenvalues[p] - shift;
    if (value > 0.25 * rtol * rtol * largest && value < smallest) smallest = value;
  }
  const bool precise_enough = largest * kEps64 <= inversion_tolerance(dtype) * smallest;
  return {precise_enough ? Inversion::from_rows : Inversion::needs_second_pass, k, shift};
}

// basis (r, k): the inverse of `rows`, by columns, where k = r.
template <class Team>
EFLAT_HD void correction_basis(const Team& team, int k, int r, const double* rows,
                               const double* eigenvalues, double* basis, int stride) {
  for (int j = 0; j < r; ++j)
    for (int p = team.lane(); p < k; p += team.lanes())
      basis[j * stride + p] = rows[p * r + j] / eigenvalues[p];
  team.sync();
}

// second: (k, k), the Gram matrix of factor * T. Replaces rows and eigenvalues; returns the rank.
// work: 2 r^2 + r.
template <class Team>
EFLAT_HD int correct_rows(const Team& team, int k, int r, const double* second, double* rows,
                          double* eigenvalues, double* work) {
  double* inner = work;  // second = inner^T inner
  double* corrected = work + r * r;
  const int rank = pivoted_cholesky(team, k, second, inner, work + 2 * r * r);
  multiply(team, rank, k, r, inner, rows, corrected);
  for (int e = team.lane(); e < rank * r; e += team.lanes()) rows[e] = corrected[e];
  team.sync();
  orthogonalise_rows(team, rank, r, rows, eigenvalues);
  return rank;
}

}  // namespace EFLAT_TARGET
}  // namespace eflat
