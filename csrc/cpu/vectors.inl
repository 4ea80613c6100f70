// Vectors of kLanes numbers: reading and writing every element type, and exchanging lanes. Included
// by kernels.inl, once per instruction set.

namespace eflat {
inline namespace EFLAT_TARGET {
namespace {

constexpr int kLanes = EFLAT_LANES;

// Vectors of EFLAT_LANES elements, and as they lie in memory: aligned as their elements, aliasing.
// The latter are only read and written through pointers: Clang takes a reference to one, and a type
// that a template deduces from it, for those of aligned vectors.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
  typedef T stored __attribute__((vector_size(sizeof(T) * kLanes), aligned(sizeof(T)), may_alias));
};
using Vec = VectorOf<double>::type;
using VecF = VectorOf<float>::type;
using VecU = VectorOf<uint32_t>::type;
using VecH = VectorOf<uint16_t>::type;

EFLAT_HD Vec read(const double* p) { return *reinterpret_cast<const VectorOf<double>::stored*>(p); }
EFLAT_HD VecF read(const float* p) { return *reinterpret_cast<const VectorOf<float>::stored*>(p); }
EFLAT_HD VecH read(const uint16_t* p) {
  return *reinterpret_cast<const VectorOf<uint16_t>::stored*>(p);
}

// f(0) ... f(N - 1), written out: a loop over an array of vectors may leave it in memory, where it
// was meant to live in registers.
template <class F, int... I>
EFLAT_HD void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(I), ...);
}
template <int N, class F>
EFLAT_HD void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, N>());
}
#define EFLAT_INLINE __attribute__((always_inline))

// Vectors as they are read and written: float64 as it is, other types as float32, half the size to
// transpose.
EFLAT_HD Vec load(const double* p) { return read(p); }
EFLAT_HD VecF load(const float* p) { return read(p); }
EFLAT_HD VecF load(const bf16* p) {
  return (VecF)(__builtin_convertvector(read(&p->bits), VecU) << 16);
}
EFLAT_HD VecF load(const f16* p) {  // as to_double(f16)
  const VecU half = __builtin_convertvector(read(&p->bits), VecU);
  const VecU sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const VecU normal = (magnitude << 13) + (112u << 23);
  const VecU special = (magnitude << 13) | 0x7f800000u;
  const VecU subnormal = (VecU)((VecF)(magnitude | 0x3f000000u) - 0.5f);
  const VecU bits = magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : special;
  return (VecF)(bits | sign);
}
template <class T>
struct Loaded {
  using type = VecF;
};
template <>
struct Loaded<double> {
  using type = Vec;
};

EFLAT_HD Vec widen(const Vec& v) { return v; }
EFLAT_HD Vec widen(const VecF& v) { return __builtin_convertvector(v, Vec); }
EFLAT_HD void narrow(const Vec& v, Vec& out) { out = v; }
EFLAT_HD void narrow(const Vec& v, VecF& out) { out = __builtin_convertvector(v, VecF); }

EFLAT_HD void save(const Vec& v, double* p) { *reinterpret_cast<VectorOf<double>::stored*>(p) = v; }
EFLAT_HD void save(const VecF& v, float* p) { *reinterpret_cast<VectorOf<float>::stored*>(p) = v; }
template <class T>
EFLAT_HD void save(const VecF& v, T* p) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_double<T>(v[i]);
}

// Numbers rounded to a type, as a store rounds them.
EFLAT_HD Vec rounded(const Vec& v, double) { return v; }
EFLAT_HD VecF rounded(const VecF& v, float) { return v; }
EFLAT_HD VecF rounded(const VecF& v, bf16) {  // as from_double<bf16>
  const VecU bits = (VecU)v, even = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return (VecF)((bits & 0x7fffffffu) > 0x7f800000u ? bits : even);
}
EFLAT_HD VecF rounded(const VecF& v, f16) {  // as from_double<f16>
  const VecU bits = (VecU)v, magnitude = bits & 0x7fffffffu;
  const VecU even = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & 0xffffe000u;
  const VecU subnormal = (VecU)(((VecF)magnitude + 0.5f) - 0.5f);
  const VecU infinite = magnitude * 0u + 0x7f800000u;
  VecU result = magnitude < 0x38800000u ? subnormal : even;
  result = magnitude < 0x477ff000u ? result : infinite;
  result = magnitude > 0x7f800000u ? magnitude : result;
  return (VecF)(result | (bits & 0x80000000u));
}

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int Step, class V, int... Lane>
EFLAT_HD void exchange_lanes(V& a, V& b, std::integer_sequence<int, Lane...>) {
  const V low = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane : Lane + Step)...);
  a = low;
}

// rows[i][j] becomes rows[j][i]: blocks of Step x Step lanes change places, for Step = 1, 2, 4.
// With N < kLanes rows, bits of the lane change places with bits of the row: N contiguous columns
// of kLanes matrix rows become N vectors, a column each, in an order of the matrix rows that is the
// same for all. Its own inverse.
template <int N, int Step = 1, class V>
EFLAT_HD void transpose(V (&rows)[N]) {
  if constexpr (Step < N) {
    unrolled<N>([&](int i) EFLAT_INLINE {
      if (!(i & Step)) exchange_lanes<Step>(rows[i], rows[i | Step], Lanes());
    });
    transpose<N, 2 * Step>(rows);
  }
}

// rows[0][i] becomes the sum of the lanes of rows[i].
template <int Step = 1>
EFLAT_HD void add_lanes(Vec* rows) {
  unrolled<kLanes>([&](int i) EFLAT_INLINE {
    if (i % (2 * Step) == 0) {
      exchange_lanes<Step>(rows[i], rows[i + Step], Lanes());
      rows[i] += rows[i + Step];
    }
  });
  if constexpr (2 * Step < kLanes) add_lanes<2 * Step>(rows);
}

}  // namespace
}  // namespace EFLAT_TARGET
}  // namespace eflat
