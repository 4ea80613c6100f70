// AdamW of a factor's elements. Included before kernels.inl, under the same rules.
//
// Bytes per element of the factor: value, gradient and both moments are read, value and moments are
// written, 28 in float32. Square root and divisions are vectors of the machine's own
// width, chosen by the compiler.
#include "kernels.h"

namespace eflat {
inline namespace EFLAT_TARGET {
namespace {

template <class T>
void to_floats(const T* x, int n, float* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = float(to_double(x[i]));
}
template <class T>
void from_floats(const float* x, int n, T* out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = from_double<T>(x[i]);
}

constexpr int kStepChunk = 256;  // elements, in the L1 cache

// Two loops, so that the compiler cannot fuse a decay's product with what is added to it.
template <class C>
void adamw_chunk(C* x, const C* grad, C* exp_avg, C* exp_avg_sq, int n, AdamWNumbers<C> numbers) {
#pragma omp simd
  for (int i = 0; i < n; ++i) decay(x[i], exp_avg_sq[i], numbers);
#pragma omp simd
  for (int i = 0; i < n; ++i) adamw(x[i], grad[i], exp_avg[i], exp_avg_sq[i], numbers);
}

// C is T, or float for the 16-bit types.
template <class T, class C>
void adamw_elements(const AdamW& a, const void* gradient, int64_t begin, int64_t end) {
  const AdamWNumbers<C> numbers = adamw_numbers<C>(a, a.step_number);
  for (int64_t i = begin; i < end; i += kStepChunk) {
    const int n = int(end - i < kStepChunk ? end - i : kStepChunk);
    T *factor = static_cast<T*>(a.factor) + i, *exp_avg = static_cast<T*>(a.exp_avg) + i,
      *exp_avg_sq = static_cast<T*>(a.exp_avg_sq) + i;
    const T* grad = static_cast<const T*>(gradient) + i;
    if constexpr (sizeof(T) == sizeof(C)) {
      adamw_chunk(factor, grad, exp_avg, exp_avg_sq, n, numbers);
    } else {
      C x[kStepChunk], g[kStepChunk], m[kStepChunk], v[kStepChunk];
      to_floats(factor, n, x);
      to_floats(grad, n, g);
      to_floats(exp_avg, n, m);
      to_floats(exp_avg_sq, n, v);
      adamw_chunk(x, g, m, v, n, numbers);
      from_floats(x, n, factor);
      from_floats(m, n, exp_avg);
      from_floats(v, n, exp_avg_sq);
    }
  }
}

void adamw_elements(const AdamW& a, const void* grad, DType dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::f64:
      return adamw_elements<double, double>(a, grad, begin, end);
    case DType::f32:
      return adamw_elements<float, float>(a, grad, begin, end);
    case DType::bf16:
      return adamw_elements<bf16, float>(a, grad, begin, end);
    case DType::f16:
      return adamw_elements<f16, float>(a, grad, begin, end);
  }
}

}  // namespace
}  // namespace EFLAT_TARGET
}  // namespace eflat
