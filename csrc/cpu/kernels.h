// The vectorised inner loops, compiled once per instruction set and chosen at run time.
#pragma once
#include "../coefficients.h"
#include "../pairs.h"

namespace eflat::cpu {

constexpr int64_t kMaxPack = 16;  // packed rows are padded to at most a multiple of this

// Upper bound, in doubles, of what a kernel needs as scratch for rank r.
constexpr int64_t scratch_size(int64_t r) {
  const int64_t padded = 2 * r + kMaxPack;
  return 2 * (4096 + 64 * padded) + 8 * r * r + 8 * padded;
}

struct Kernels {
  const char* name;
  int lanes;  // float64 lanes of a vector

  // gram (2r, 2r), symmetric, of rows [begin, end) of [factor | grad]; (r, r) without grad.
  // scratch: also for the padded Gram matrix.
  void (*gram)(const Side& side, DType dtype, int r, int64_t begin, int64_t end, double* gram,
               double* scratch);

  // gram (k, k) of rows [begin, end) of factor * basis, basis (r, k).
  void (*second_gram)(const Side& side, DType dtype, int r, int k, const double* basis,
                      int64_t begin, int64_t end, double* gram, double* scratch);

  // out[begin, end) = scale * [factor | grad] * weights, weights (2r, r), or its moving average.
  void (*apply)(const Side& side, DType dtype, int r, int64_t begin, int64_t end,
                const double* weights, double scale, Update update, void* out, DType out_dtype,
                double* scratch);

  InversionState (*invert_gram)(int r, const double* M, double rtol, DType dtype, double* inverse,
                                double* rows, double* eigenvalues, double* work);
  void (*correction_basis)(int k, int r, const double* rows, const double* eigenvalues,
                           double* basis);
  int (*correct_rows)(int k, int r, const double* second, double* rows, double* eigenvalues,
                      double* work);
  void (*truncated_inverse)(int k, int r, double shift, double rtol, const double* rows,
                            const double* eigenvalues, double* inverse, double* work);
  Coefficients (*coefficients)(int r, const double* gram_t, const double* P_t, const double* gram_o,
                               const double* P_o, double scaling, DType dtype, double rho,
                               double* weights, double* work);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The fastest that this processor runs; EFLAT_CPU=baseline|avx2|avx512 asks for a lesser one.
const Kernels& kernels();

}  // namespace eflat::cpu
