// AdamW of a factor's elements. Included before kernels.inl, under the same rules.
//
// Bytes per element of the factor: clean value, gradient and both moments are read, factor and
// moments are written, 28 in float32. Square root and divisions are vectors of the machine's own
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

// C is T, or float for the 16-bit types. `clean` may be the factor.
template <class T, class C>
void adamw_loop(const T* clean, const T* grad, T* factor, T* exp_avg, T* exp_avg_sq, int64_t n,
                AdamWNumbers<C> numbers) {
  if constexpr (sizeof(T) == sizeof(C)) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      T x = clean[i], m = exp_avg[i], v = exp_avg_sq[i];
      adamw(x, grad[i], m, v, numbers);
      factor[i] = x;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
    }
  } else {
    constexpr int kChunk = 256;  // in the L1 cache
    C x[kChunk], g[kChunk], m[kChunk], v[kChunk];
    for (int64_t i = 0; i < n; i += kChunk) {
      const int count = int(n - i < kChunk ? n - i : kChunk);
      to_floats(clean + i, count, x);
      to_floats(grad + i, count, g);
      to_floats(exp_avg + i, count, m);
      to_floats(exp_avg_sq + i, count, v);
      adamw_loop<C, C>(x, g, x, m, v, count, numbers);
      from_floats(x, count, factor + i);
      from_floats(m, count, exp_avg + i);
      from_floats(v, count, exp_avg_sq + i);
    }
  }
}

template <class T, class C>
void adamw_elements(const AdamW& a, const void* clean, const void* grad, int64_t begin,
                    int64_t end) {
  adamw_loop(static_cast<const T*>(clean) + begin, static_cast<const T*>(grad) + begin,
             static_cast<T*>(a.factor) + begin, static_cast<T*>(a.exp_avg) + begin,
             static_cast<T*>(a.exp_avg_sq) + begin, end - begin,
             adamw_numbers<C>(a, a.step_number));
}

void adamw_elements(const AdamW& a, const void* clean, const void* grad, DType dtype, int64_t begin,
                    int64_t end) {
  switch (dtype) {
    case DType::f64:
      return adamw_elements<double, double>(a, clean, grad, begin, end);
    case DType::f32:
      return adamw_elements<float, float>(a, clean, grad, begin, end);
    case DType::bf16:
      return adamw_elements<bf16, float>(a, clean, grad, begin, end);
    case DType::f16:
      return adamw_elements<f16, float>(a, clean, grad, begin, end);
  }
}

}  // namespace
}  // namespace EFLAT_TARGET
}  // namespace eflat
