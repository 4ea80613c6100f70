// Conversions of the 16-bit types: every value there and back, and rounding to nearest even.
#include <cmath>
#include <random>

#include "../../csrc/core/dtypes.h"
#include "check.h"

using namespace eflat;

template <class T>
void round_trip_of_every_value() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T x{uint16_t(bits)};
    const double value = to_double(x);
    const T back = from_double<T>(value);
    if (std::isnan(value)) {
      CHECK(std::isnan(to_double(back)), "bits %x", bits);
    } else {
      CHECK(back.bits == x.bits, "bits %x became %x", bits, unsigned(back.bits));
    }
  }
}

// Between two neighbours, the nearer one; halfway, the even one.
template <class T>
void rounding(uint16_t last_finite) {
  for (uint16_t bits = 0; bits < last_finite; ++bits) {
    const T low{bits}, high{uint16_t(bits + 1)};
    const double a = to_double(low), b = to_double(high), middle = (a + b) / 2;
    const double step = (b - a) / 8;
    CHECK(from_double<T>(middle - step).bits == low.bits, "below the middle, bits %x", bits);
    CHECK(from_double<T>(middle + step).bits == high.bits, "above the middle, bits %x", bits);
    CHECK(from_double<T>(middle).bits == (bits & 1 ? high.bits : low.bits), "at %x", bits);
    CHECK(from_double<T>(-middle).bits == ((bits & 1 ? high.bits : low.bits) | 0x8000), "at -%x",
          bits);
  }
}

int main() {
  round_trip_of_every_value<bf16>();
  round_trip_of_every_value<f16>();
  rounding<f16>(0x7bff);
  // A float32 has no bits between neighbours among bfloat16's subnormals' last ones; start above.
  for (uint16_t bits = 0x0100; bits < 0x7f7f; ++bits) {
    const bf16 low{bits}, high{uint16_t(bits + 1)};
    const double middle = (to_double(low) + to_double(high)) / 2;
    CHECK(from_double<bf16>(middle).bits == (bits & 1 ? high.bits : low.bits), "at %x", bits);
  }
  CHECK(std::isinf(to_double(from_double<f16>(65520.0))), "rounds beyond the largest");
  CHECK(to_double(from_double<f16>(65519.0)) == 65504.0, "rounds to the largest");
  CHECK(std::isnan(to_double(from_double<f16>(NAN))), "NaN");
  CHECK(std::isnan(to_double(from_double<bf16>(NAN))), "NaN");
  std::puts("dtypes: 1 passed, 0 failed");
}
