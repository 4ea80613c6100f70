// Element types of factors and gradients, and their conversions, for host and device alike.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define EFLAT_HD __host__ __device__ __forceinline__
#else
#define EFLAT_HD inline __attribute__((always_inline))
#endif

namespace eflat {

enum class DType : int { f64, f32, bf16, f16 };

// Storage types. The 16-bit ones hold bits only: arithmetic is done in float64.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
EFLAT_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

EFLAT_HD double to_double(double x) { return x; }
EFLAT_HD double to_double(float x) { return x; }
EFLAT_HD double to_double(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
EFLAT_HD double to_double(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = (magnitude << 13) | 0x7f800000u;
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + (112u << 23);
  } else {  // subnormal: 0.5f has a unit in the last place of 2^-24
    bits = bit_cast<uint32_t>(bit_cast<float>(0x3f000000u | magnitude) - 0.5f);
  }
  return bit_cast<float>(bits | sign);
}

template <class T>
EFLAT_HD T from_double(double x);
template <>
EFLAT_HD double from_double<double>(double x) {
  return x;
}
template <>
EFLAT_HD float from_double<float>(double x) {
  return static_cast<float>(x);
}
template <>
EFLAT_HD bf16 from_double<bf16>(double x) {  // round to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
EFLAT_HD f16 from_double<f16>(double x) {  // round to nearest, ties to even
  const float value = static_cast<float>(x);
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 2^16
  if (magnitude < 0x38800000u) {  // subnormal: let the addition to 0.5 round
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {uint16_t(sign | ((rounded - (112u << 23)) >> 13))};
}

// Addends of a float64 factor are float64, all others float32; the sum is rounded to the factor's
// type, as torch's (factor + added).to(factor.dtype).
template <class T>
struct AddedTo {
  using type = float;
};
template <>
struct AddedTo<double> {
  using type = double;
};
template <class T>
EFLAT_HD T point(T factor, typename AddedTo<T>::type added) {
  return from_double<T>(static_cast<decltype(added)>(to_double(factor)) + added);
}

EFLAT_HD double largest_finite(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 1.7976931348623157e308;
    case DType::f32:
      return 3.4028234663852886e38;
    case DType::bf16:
      return 3.3895313892515355e38;
    default:
      return 65504.0;
  }
}

EFLAT_HD DType added_to(DType factor) { return factor == DType::f64 ? DType::f64 : DType::f32; }

EFLAT_HD int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace eflat
