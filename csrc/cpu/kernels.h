// The vectorised inner loops, compiled once per instruction set and chosen at run time.
#pragma once
#include "../core/adamw.h"
#include "../core/coefficients.h"
#include "../core/pairs.h"

namespace eflat::cpu {

constexpr int kTile = 4;  // columns are padded to a multiple of this
// A chunk of packed rows has at most kChunk elements, but at least kFewestRows rows.
constexpr int kMostRows = 512, kFewestRows = 64, kChunk = 16384;

// Upper bound, in doubles, of what a kernel needs as scratch for rank r.
constexpr int64_t scratch_size(int64_t r) {
  const int64_t columns = 2 * r + 2 * kTile;  // of [factor | grad], and of its product
  return 2 * (kChunk + (kFewestRows + 8) * columns + 8 * kMostRows) + 3 * columns * columns;
}

struct Kernels {
  const char* name;

  // In these three `factor` is the side's point, see pairs.h.

  // gram (2r, 2r), symmetric, of rows [begin, end) of [factor | grad]; (r, r) without grad.
  // scratch: also for the padded Gram matrix.
  void (*gram)(const Side& side, DType dtype, int r, int64_t begin, int64_t end, double* gram,
               double* scratch);

  // gram (2r, 2r) of rows [begin, end) of [factor * T | grad * T_grad], T and T_grad (r, r).
  void (*second_gram)(const Side& side, DType dtype, int r, const double* T, const double* T_grad,
                      int64_t begin, int64_t end, double* gram, double* scratch);

  // side.out[begin, end) = scale * [factor | grad] * weights, weights (2r, r), or its moving
  // average. What is written may be what was added to the factor: of each row it is read before.
  void (*apply)(const Side& side, DType dtype, int r, int64_t begin, int64_t end,
                const double* weights, double scale, Update update, DType out_dtype,
                double* scratch);

  // AdamW of elements [begin, end) of a factor.
  void (*adamw)(const AdamW& a, const void* grad, DType dtype, int64_t begin, int64_t end);

  // See pseudo_inverse.h and coefficients.h.
  bool (*invert_gram)(int r, const double* M, double rtol, DType dtype, double* inverse, double* R,
                      double* T, double* work);
  void (*correct_inverse)(int r, bool again, const double* second, double rtol, const double* R,
                          double* inverse, double* work);
  double (*norm_and_weights)(int r, const double* gram_t, const double* P_t, const double* gram_o,
                             const double* P_o, double scaling, DType norms_dtype, double* weights,
                             double* work);
  double (*tangent_norm_and_weights)(int r, const double* gram_t, const double* P_t,
                                     const double* gram_o, const double* P_o, const double* T_t,
                                     const double* T_o, double scaling, double rho, int64_t length,
                                     DType norms_dtype, double* weights, double* weights_other,
                                     double* work);
  void (*leave_bases)(int r, const double* T_t, const double* T_o, double* weights, double* work);
  double (*perturbation_size)(int r, const double* gram_t, double scaling, const double* weights,
                              double norm, double rho, DType dtype);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The fastest that this processor runs; EFLAT_CPU=baseline|avx2 asks for a lesser one.
const Kernels& kernels();

}  // namespace eflat::cpu
