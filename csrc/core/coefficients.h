// From the Gram matrices of both sides of a LoRA pair to the norm of the full-space gradient and
// the r x r coefficients of the perturbation.
//
// A side is a factor and its gradient, seen as length x r matrices: Z = [B | G_B] with n rows, or
// Z = [A^T | G_A^T] with m rows. Its Gram matrix holds all that is needed of it:
//
//     Z^T Z = [ M   F ]      B side: M = B^T B,  F = B^T G_B = C,    K = G_B^T G_B
//             [ F^T K ]      A side: M = A A^T,  F = A G_A^T = N^T,  K = G_A G_A^T
//
// The two directions of the transfer differ only in which side is the target (t) and which the
// other (o). DESIGN: with P = M^+,
//
//     (2 s ||G_hat||)^2 = tr(P_o K_t) + tr(P_t K_o) + 2 <Q, F_t>       Q = P_t F_o^T P_o
//     E                 = c Z_t [ Q   ]                                c = rho / (2 s^2 ||G_hat||)
//                               [ P_o ]
//
// onto B: Q = M_B^+ N M_A^+, E_B = c [ B Q + G_B M_A^+ ].  onto A: the transpose of
// E_A = c [ M_B^+ G_A + (M_B^+ C M_A^+) A ].
//
// Onto both, of which B is the target, E is rho times the direction of the gradient's projection P
// on the tangent space of the matrices of rank r, whose two terms are orthogonal:
//
//     s P = [ (G_B - B M_B^+ C) M_A^+ ] A + B [ M_B^+ G_A ] = (E_B A + B E_A) / c'
//     (s ||P||)^2 = tr(M_A^+ S) + tr(M_B^+ K_A)    S = K_B - C^T M_B^+ C    c' = rho / (s^2 ||P||)
//
// The perturbed factors also have the product s E_B E_A. Where it would be more than half of rho,
// as while B is small, B alone carries the direction of G_B M_A^+ A.
#pragma once
#include "pseudo_inverse.h"

namespace eflat {

// c of one layer, 0 for a layer to be left alone. `scope_norm` is ||G_hat|| of the layer, or of
// all of them.
EFLAT_HD double scale_of(double scaling, double rho, double scope_norm) {
  return rho / (2 * scaling * scaling * scope_norm);
}

EFLAT_HD bool usable(double norm) { return norm > 0 && norm <= 1.7976931348623157e308; }

inline namespace EFLAT_TARGET {

// A norm as it counts in the type that norms are reported in; NaN or infinite when a factor or
// gradient is not finite, which the trace shows even where `norm` does not.
template <class Team>
EFLAT_HD double reported_norm(const Team& team, int r, const double* gram_t, const double* gram_o,
                              double norm, DType norms_dtype) {
  const int d = 2 * r;
  double trace = 0;
  for (int i = thread_of(team); i < d; i += threads_of(team))
    trace += gram_t[i * d + i] + gram_o[i * d + i];
  trace = team.total(trace);
  norm += trace - trace;
  // A norm that is zero or infinite in that type counts as such.
  const double reported = static_cast<float>(norm);
  return norms_dtype == DType::f64 || usable(reported) ? norm : reported;
}

// ||G_hat|| of a pair (NaN or infinite when its input is) and the weights [Q; P_o], (2r, r).
// gram_t, gram_o: (2r, 2r), symmetric; P_t, P_o: (r, r). work: r^2.
template <class Team>
EFLAT_HD double norm_and_weights(const Team& team, int r, const double* gram_t, const double* P_t,
                                 const double* gram_o, const double* P_o, double scaling,
                                 DType norms_dtype, double* weights, double* work) {
  const int d = 2 * r;
  double* Q = weights;
  double* FP = work;  // F_o^T P_o
  for (int i = team.row(); i < r; i += team.rows())
    combine_rows(team, r, r, gram_o + r + i, d, P_o, r, nullptr, 1, FP + i * r);
  team.sync();
  multiply(team, r, r, r, P_t, FP, Q);
  copy(team, r * r, P_o, weights + r * r);

  double square = 0;
  for (int i = team.row(); i < r; i += team.rows()) {
    EFLAT_SUM_OVER(square)
    for (int j = team.lane(); j < r; j += team.lanes())
      square += P_o[i * r + j] * gram_t[(r + i) * d + r + j] +
                P_t[i * r + j] * gram_o[(r + i) * d + r + j] +
                2 * Q[i * r + j] * gram_t[i * d + r + j];
  }
  square = team.total(square);
  const double norm = sqrt(square < 0 ? 0 : square) / (2 * fabs(scaling));
  return reported_norm(team, r, gram_t, gram_o, norm, norms_dtype);
}

// x (r, r) becomes T_rows x T_columns^T. work: r^2.
template <class Team>
EFLAT_HD void leave_basis(const Team& team, int r, const double* T_rows, const double* T_columns,
                          double* x, double* work) {
  multiply_transposed(team, r, r, r, x, T_columns, work);
  multiply(team, r, r, r, T_rows, work, x);
}

// Onto both: ||P|| of a pair and twice the weights, as c is half of c': of the target, (2r, r), and
// of the other side. T_t, T_o: the bases that all of it is in, null where there are none. length:
// of the target. work: 4 r^2.
template <class Team>
EFLAT_HD double tangent_norm_and_weights(const Team& team, int r, const double* gram_t,
                                         const double* P_t, const double* gram_o, const double* P_o,
                                         const double* T_t, const double* T_o, double scaling,
                                         double rho, int64_t length, DType norms_dtype,
                                         double* weights, double* weights_other, double* work) {
  const int d = 2 * r, n = r * r;
  double* PC = work;  // P_t C
  double* S = work + n;
  double* x = work + 2 * n;
  double* y = work + 3 * n;
  const double* C = gram_t + r;            // row stride d, as all of these
  const double* K_t = gram_t + r * d + r;  // of the gradients
  const double* K_o = gram_o + r * d + r;
  double rank = 0;
  for (int i = team.row(); i < r; i += team.rows()) {
    combine_rows(team, r, r, P_t + i * r, 1, C, d, nullptr, 1, PC + i * r);
    for (int j = team.lane(); j < r; j += team.lanes()) rank += P_t[i * r + j] * gram_t[i * d + j];
  }
  // Nothing is beside B's columns then, and rounding must not take its place.
  const bool spans = team.total(rank) > length - 0.5;
  for (int i = team.row(); i < r; i += team.rows()) {
    if (spans) {
      for (int j = team.lane(); j < r; j += team.lanes()) S[i * r + j] = 0;
    } else {
      combine_rows(team, r, r, C + i, d, PC, r, K_t + i * d, -1, S + i * r);
    }
  }
  double of_B = 0, of_B_alone = 0, of_A = 0;  // squares of the norms of s P's terms
  for (int i = team.row(); i < r; i += team.rows()) {
    for (int j = team.lane(); j < r; j += team.lanes()) {
      of_B += P_o[i * r + j] * S[i * r + j];
      of_B_alone += P_o[i * r + j] * K_t[i * d + j];
      of_A += P_t[i * r + j] * K_o[i * d + j];
    }
  }
  of_B = team.total(of_B);
  of_B_alone = team.total(of_B_alone);
  of_A = team.total(of_A);
  double square = (of_B < 0 ? 0 : of_B) + (of_A < 0 ? 0 : of_A);  // NaN stays

  // ||E_B E_A||^2 = tr(E_B^T E_B E_A E_A^T), both by c'.
  multiply(team, r, r, r, P_o, S, y);
  multiply(team, r, r, r, y, P_o, x);
  if (T_o) leave_basis(team, r, T_o, T_o, x, y);
  for (int i = team.row(); i < r; i += team.rows())
    combine_rows(team, r, r, P_t + i * r, 1, K_o, d, nullptr, 1, S + i * r);
  team.sync();
  multiply(team, r, r, r, S, P_t, y);
  if (T_t) leave_basis(team, r, T_t, T_t, y, S);
  // Scaled to gradients of norm 1, whose fourth powers fit float64.
  for (int e = thread_of(team); e < n; e += threads_of(team)) {
    x[e] /= square;
    y[e] /= square;
  }
  const double product = dot(team, n, x, y);
  const bool alone = 2 * rho * sqrt(product < 0 ? 0 : product) > fabs(scaling);
  if (alone) square = of_B_alone;

  multiply(team, r, r, r, PC, P_o, x);
  for (int e = thread_of(team); e < n; e += threads_of(team)) {
    weights[e] = alone || spans ? 0 : -2 * x[e];
    weights[n + e] = spans && !alone ? 0 : 2 * P_o[e];
    weights_other[e] = 0;
    weights_other[n + e] = alone ? 0 : 2 * P_t[e];
  }
  const double norm = sqrt(square < 0 ? 0 : square) / fabs(scaling);
  return reported_norm(team, r, gram_t, gram_o, norm, norms_dtype);
}

// Weights made in the bases T_t, T_o of pseudo_inverse.h, for the factors and gradients as they
// are: [T_t Q T_o^T; T_o P_o T_o^T]. work: r^2.
template <class Team>
EFLAT_HD void leave_bases(const Team& team, int r, const double* T_t, const double* T_o,
                          double* weights, double* work) {
  leave_basis(team, r, T_t, T_o, weights, work);
  leave_basis(team, r, T_o, T_o, weights + r * r, work);
}

// ||E|| ||G_hat|| / rho, or an upper bound of it where E is then certain to be finite in `dtype`:
// ||Z W|| <= ||Z|| ||W|| settles it nearly always.
template <class Team>
EFLAT_HD double perturbation_size(const Team& team, int r, const double* gram_t, double scaling,
                                  const double* weights, double norm, double rho, DType dtype) {
  const int d = 2 * r;
  double trace = 0;
  for (int i = 0; i < d; ++i) trace += gram_t[i * d + i];
  const double bound =
      sqrt(trace) * sqrt(dot(team, d * r, weights, weights)) / (2 * scaling * scaling);
  if (!usable(norm) || rho * bound <= largest_finite(dtype) * norm) return bound;
  double square = 0;
  for (int i = team.row(); i < d; i += team.rows()) {
    for (int j = team.lane(); j < r; j += team.lanes()) {
      double v = 0;
      for (int k = 0; k < d; ++k) v += gram_t[i * d + k] * weights[k * r + j];
      square += v * weights[i * r + j];
    }
  }
  square = team.total(square);
  return sqrt(square < 0 ? 0 : square) / (2 * scaling * scaling);
}

}  // namespace EFLAT_TARGET

// Turns layers' norms and sizes into their factors c. A layer whose norm is zero or not finite, or
// whose E would not be finite in its type (its norm becomes infinite then), gets c = 0. With one
// norm for all layers, the root of the sum of squares runs over the layers that are left. Layers:
// norm(l), size(l), scaling(l), dtype(l) by index; norm is written, c is written, each by the
// thread that reads it.
template <class Team, class Layers>
EFLAT_HD void finish_scales(const Team& team, Layers& layers, int count, double rho, bool global) {
  const int first = thread_of(team), step = threads_of(team);
  for (bool again = true; again;) {
    double total = 0;
    if (global) {
      double largest = 0, squares = 0;  // of norm / largest: no overflow
      for (int l = first; l < count; l += step)
        if (usable(layers.norm(l)) && layers.norm(l) > largest) largest = layers.norm(l);
      largest = team.largest(largest);
      for (int l = first; l < count; l += step) {
        if (!usable(layers.norm(l))) continue;
        const double x = layers.norm(l) / largest;
        squares += x * x;
      }
      total = largest * sqrt(team.total(squares));
    }
    bool changed = false;
    for (int l = first; l < count; l += step) {
      double& norm = layers.norm(l);
      layers.scale(l) = 0;
      if (!usable(norm)) continue;
      const double scope_norm = global ? total : norm;
      const double scale = scale_of(layers.scaling(l), rho, scope_norm);
      if (rho * layers.size(l) / scope_norm <= largest_finite(layers.dtype(l)) &&
          scale <= largest_finite(DType::f64)) {
        layers.scale(l) = scale;
      } else {
        norm = HUGE_VAL;
        changed = true;
      }
    }
    again = global && team.total(changed) > 0;
  }
}

}  // namespace eflat
