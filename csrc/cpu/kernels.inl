// The vectorised inner loops. Included by kernels_{baseline,avx2,avx512}.cpp, which set
//   EFLAT_TARGET  the inline namespace that keeps the three apart
//   EFLAT_LANES   float64 lanes of a vector
//   EFLAT_ROWS    accumulator rows of a register tile, a multiple of EFLAT_LANES
//   EFLAT_VECTORS accumulator vectors of a row
// and the compiler's target. No inline function of the standard library may be called here: the
// linker would keep one copy of it for all, perhaps one that this processor cannot run.
//
// Everything works on packed rows: a chunk of [factor | grad] rows, converted to float64,
//
//     z[k * ld + j],  k < chunk,  j < 2r,  zeros up to ld (a multiple of EFLAT_ROWS)
//
// small enough to stay in the L1 cache. A (r, m) is transposed on the way, so that both sides of a
// pair go through the same two loops: z^T z (gram) and z * weights (product). Both keep a tile of
// EFLAT_ROWS x EFLAT_VECTORS vectors in registers; per vector loaded there are EFLAT_ROWS fused
// multiply-adds, so they run at the rate of the multiply-add units, not of memory: at rank 16 a
// float32 row pair has 128 bytes and about 1,100 multiply-adds.

namespace eflat {
inline namespace EFLAT_TARGET {
namespace {

constexpr int kLanes = EFLAT_LANES, kRows = EFLAT_ROWS, kVectors = EFLAT_VECTORS;

// Unaligned, aliasing vectors of EFLAT_LANES elements.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes), aligned(sizeof(T)), may_alias));
};
using Vec = VectorOf<double>::type;
using VecF = VectorOf<float>::type;
using VecU = VectorOf<uint32_t>::type;
using VecH = VectorOf<uint16_t>::type;

EFLAT_HD Vec& at(double* p) { return *reinterpret_cast<Vec*>(p); }
EFLAT_HD const Vec& at(const double* p) { return *reinterpret_cast<const Vec*>(p); }

EFLAT_HD Vec widen(const double* p) { return at(p); }
EFLAT_HD Vec widen(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const VecF*>(p), Vec);
}
EFLAT_HD Vec widen(const bf16* p) {
  const VecU bits = __builtin_convertvector(*reinterpret_cast<const VecH*>(p), VecU) << 16;
  return __builtin_convertvector((VecF)bits, Vec);
}
EFLAT_HD Vec widen(const f16* p) {  // as to_double(f16)
  const VecU half = __builtin_convertvector(*reinterpret_cast<const VecH*>(p), VecU);
  const VecU sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const VecU normal = (magnitude << 13) + (112u << 23);
  const VecU special = (magnitude << 13) | 0x7f800000u;
  const VecU subnormal = (VecU)((VecF)(magnitude | 0x3f000000u) - 0.5f);
  const VecU bits = magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : special;
  return __builtin_convertvector((VecF)(bits | sign), Vec);
}

EFLAT_HD void narrow(const Vec& v, double* p) { at(p) = v; }
EFLAT_HD void narrow(const Vec& v, float* p) {
  *reinterpret_cast<VecF*>(p) = __builtin_convertvector(v, VecF);
}
template <class T>
EFLAT_HD void narrow(const Vec& v, T* p) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_double<T>(v[i]);
}

template <int Step, int... Lane>
EFLAT_HD void exchange_lanes(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
  const Vec low = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Step ? kLanes + Lane : Lane + Step)...);
  a = low;
}

// rows[i][j] becomes rows[j][i]: blocks of Step x Step lanes change places, for Step = 1, 2, 4.
template <int Step = 1>
EFLAT_HD void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Step))
      exchange_lanes<Step>(rows[i], rows[i | Step], std::make_integer_sequence<int, kLanes>());
  if constexpr (2 * Step < kLanes) transpose<2 * Step>(rows);
}

constexpr int pad(int n) { return (n + kRows - 1) / kRows * kRows; }

// Rows of a chunk: a power of two for which it takes about 16 KiB.
int chunk_rows(int ld) {
  int rows = 256;
  while (rows > 16 && rows * ld > 2048) rows /= 2;
  return rows;
}

// z[k * ld + j] = x[(begin + k) * r + j], x row-major.
template <class T>
void pack_rows(const T* x, int r, int64_t begin, int count, double* z, int ld) {
  x += begin * r;
  for (int k = 0; k < count; ++k, x += r, z += ld) {
    int j = 0;
    for (; j + kLanes <= r; j += kLanes) at(z + j) = widen(x + j);
    for (; j < r; ++j) z[j] = to_double(x[j]);
  }
}

// z[k * ld + j] = x[j * length + begin + k]: a transposed factor, by square blocks.
template <class T>
void pack_columns(const T* x, int64_t length, int r, int64_t begin, int count, double* z, int ld) {
  x += begin;
  int j = 0;
  for (; j + kLanes <= r; j += kLanes) {
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = widen(x + (j + i) * length + k);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) at(z + (k + i) * int64_t(ld) + j) = rows[i];
    }
    for (; k < count; ++k)
      for (int i = 0; i < kLanes; ++i)
        z[k * int64_t(ld) + j + i] = to_double(x[(j + i) * length + k]);
  }
  for (; j < r; ++j)
    for (int k = 0; k < count; ++k) z[k * int64_t(ld) + j] = to_double(x[j * length + k]);
}

template <class T>
void pack(const Side& side, int r, int64_t begin, int count, double* z, int ld) {
  const T* factor = static_cast<const T*>(side.factor);
  const T* grad = static_cast<const T*>(side.grad);
  if (side.transposed) {
    pack_columns(factor, side.length, r, begin, count, z, ld);
    if (grad) pack_columns(grad, side.length, r, begin, count, z + r, ld);
  } else {
    pack_rows(factor, r, begin, count, z, ld);
    if (grad) pack_rows(grad, r, begin, count, z + r, ld);
  }
}

// By type; the padding is the caller's.
void pack(const Side& side, DType dtype, int r, int64_t begin, int count, double* z, int ld) {
  switch (dtype) {
    case DType::f64:
      return pack<double>(side, r, begin, count, z, ld);
    case DType::f32:
      return pack<float>(side, r, begin, count, z, ld);
    case DType::bf16:
      return pack<bf16>(side, r, begin, count, z, ld);
    case DType::f16:
      return pack<f16>(side, r, begin, count, z, ld);
  }
}

void zero(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

// out[i0 + i, j0 + j] += sum over k of z[k, i0 + i] z[k, j0 + j].
template <int V>
void gram_tile(const double* z, int ld, int count, int i0, int j0, double* out) {
  Vec sum[kRows][V] = {};
  for (int k = 0; k < count; ++k, z += ld) {
    Vec column[V];
    for (int v = 0; v < V; ++v) column[v] = at(z + j0 + v * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < V; ++v) sum[i][v] += z[i0 + i] * column[v];
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < V; ++v) at(out + (i0 + i) * int64_t(ld) + j0 + v * kLanes) += sum[i][v];
}

// out (ld, ld) += z^T z, at and right of the diagonal tiles only.
void add_gram(const double* z, int ld, int count, double* out) {
  for (int i0 = 0; i0 < ld; i0 += kRows) {
    int j0 = i0;
    for (; j0 + kVectors * kLanes <= ld; j0 += kVectors * kLanes)
      gram_tile<kVectors>(z, ld, count, i0, j0, out);
    for (; j0 < ld; j0 += kLanes) gram_tile<1>(z, ld, count, i0, j0, out);
  }
}

// Both halves of the padded sum, without padding.
void symmetrise(const double* padded, int ld, int n, double* gram) {
  for (int i = 0; i < n; ++i)
    for (int j = i; j < n; ++j) gram[i * n + j] = gram[j * n + i] = padded[i * ld + j];
}

// out[k, j0...] = sum over i of z[k, i] w[i, j0...] for M rows k and V vectors j.
template <int M, int V>
void product_tile(const double* z, int ldz, int depth, const double* w, int ldw, double* out) {
  Vec sum[M][V] = {};
  for (int i = 0; i < depth; ++i, w += ldw) {
    Vec row[V];
    for (int v = 0; v < V; ++v) row[v] = at(w + v * kLanes);
    for (int k = 0; k < M; ++k)
      for (int v = 0; v < V; ++v) sum[k][v] += z[k * int64_t(ldz) + i] * row[v];
  }
  for (int k = 0; k < M; ++k)
    for (int v = 0; v < V; ++v) at(out + k * int64_t(ldw) + v * kLanes) = sum[k][v];
}

// out (count, ldw) = z (count, depth) * w (depth, ldw).
void product(const double* z, int ldz, int count, int depth, const double* w, int ldw,
             double* out) {
  int k = 0;
  for (; k + kRows <= count; k += kRows, z += kRows * int64_t(ldz), out += kRows * int64_t(ldw)) {
    int j = 0;
    for (; j + kVectors * kLanes <= ldw; j += kVectors * kLanes)
      product_tile<kRows, kVectors>(z, ldz, depth, w + j, ldw, out + j);
    for (; j < ldw; j += kLanes) product_tile<kRows, 1>(z, ldz, depth, w + j, ldw, out + j);
  }
  for (; k < count; ++k, z += ldz, out += ldw)
    for (int j = 0; j < ldw; j += kLanes) product_tile<1, 1>(z, ldz, depth, w + j, ldw, out + j);
}

// w (rows, columns) with its rows padded to ld.
void pad_rows(const double* w, int rows, int columns, int ld, double* padded) {
  zero(padded, int64_t(rows) * ld);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) padded[i * ld + j] = w[i * columns + j];
}

void gram(const Side& side, DType dtype, int r, int64_t begin, int64_t end, double* out,
          double* scratch) {
  const int width = side.grad ? 2 * r : r, ld = pad(width), chunk = chunk_rows(ld);
  double* z = scratch;
  double* padded = z + int64_t(chunk) * ld;
  zero(scratch, int64_t(chunk) * ld + int64_t(ld) * ld);
  for (int64_t k = begin; k < end; k += chunk) {
    const int count = int(end - k < chunk ? end - k : chunk);
    pack(side, dtype, r, k, count, z, ld);
    add_gram(z, ld, count, padded);
  }
  symmetrise(padded, ld, width, out);
}

void second_gram(const Side& side, DType dtype, int r, const double* T, const double* T_grad,
                 int64_t begin, int64_t end, double* out, double* scratch) {
  const int ld = pad(2 * r), chunk = chunk_rows(ld);
  double* z = scratch;
  double* y = z + int64_t(chunk) * ld;
  double* bases = y + int64_t(chunk) * ld;  // T and T_grad on the diagonal
  double* padded = bases + int64_t(2 * r) * ld;
  zero(bases, int64_t(2 * r) * ld);
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j < r; ++j) {
      bases[i * ld + j] = T[i * r + j];
      bases[(r + i) * ld + r + j] = T_grad[i * r + j];
    }
  }
  zero(padded, int64_t(ld) * ld);
  for (int64_t k = begin; k < end; k += chunk) {
    const int count = int(end - k < chunk ? end - k : chunk);
    pack(side, dtype, r, k, count, z, ld);
    product(z, ld, count, 2 * r, bases, ld, y);
    add_gram(y, ld, count, padded);
  }
  symmetrise(padded, ld, 2 * r, out);
}

// out = e, or its moving average: one element, or a vector of them.
template <class T>
EFLAT_HD void store(T* out, double e, Update update) {
  *out = from_double<T>(update.average ? (1 - update.beta) * to_double(*out) + update.beta * e : e);
}
template <class T>
EFLAT_HD void store(T* out, const Vec& e, Update update) {
  narrow(update.average ? (1 - update.beta) * widen(out) + update.beta * e : e, out);
}

template <class T>
void store_rows(const double* e, int ld, int count, int r, double scale, Update update, T* out) {
  for (int k = 0; k < count; ++k, e += ld, out += r) {
    int j = 0;
    for (; j + kLanes <= r; j += kLanes) store(out + j, scale * at(e + j), update);
    for (; j < r; ++j) store(out + j, scale * e[j], update);
  }
}

template <class T>
void store_columns(const double* e, int ld, int count, int r, int64_t length, double scale,
                   Update update, T* out) {
  int j = 0;
  for (; j + kLanes <= r; j += kLanes) {
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = scale * at(e + (k + i) * int64_t(ld) + j);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store(out + (j + i) * length + k, rows[i], update);
    }
    for (; k < count; ++k)
      for (int i = 0; i < kLanes; ++i)
        store(out + (j + i) * length + k, scale * e[k * int64_t(ld) + j + i], update);
  }
  for (; j < r; ++j)
    for (int k = 0; k < count; ++k)
      store(out + j * length + k, scale * e[k * int64_t(ld) + j], update);
}

template <class T>
void store_chunk(const double* e, int ld, int count, int r, const Side& side, int64_t begin,
                 double scale, Update update, T* out) {
  if (side.transposed) {
    store_columns(e, ld, count, r, side.length, scale, update, out + begin);
  } else {
    store_rows(e, ld, count, r, scale, update, out + begin * r);
  }
}

void apply(const Side& side, DType dtype, int r, int64_t begin, int64_t end, const double* weights,
           double scale, Update update, void* out, DType out_dtype, double* scratch) {
  const int ld = pad(2 * r), ldw = pad(r), chunk = chunk_rows(ld);
  double* z = scratch;
  double* e = z + int64_t(chunk) * ld;
  double* w = e + int64_t(chunk) * ldw;
  pad_rows(weights, 2 * r, r, ldw, w);
  for (int64_t k = begin; k < end; k += chunk) {
    const int count = int(end - k < chunk ? end - k : chunk);
    pack(side, dtype, r, k, count, z, ld);
    product(z, ld, count, 2 * r, w, ldw, e);
    switch (out_dtype) {
      case DType::f64:
        store_chunk(e, ldw, count, r, side, k, scale, update, static_cast<double*>(out));
        break;
      case DType::f32:
        store_chunk(e, ldw, count, r, side, k, scale, update, static_cast<float*>(out));
        break;
      case DType::bf16:
        store_chunk(e, ldw, count, r, side, k, scale, update, static_cast<bf16*>(out));
        break;
      case DType::f16:
        store_chunk(e, ldw, count, r, side, k, scale, update, static_cast<f16*>(out));
        break;
    }
  }
}

constexpr cpu::Kernels table(const char* name) {
  return {
      name,
      &gram,
      &second_gram,
      &apply,
      &adamw_elements,
      [](auto... x) { return invert_gram(SerialTeam(), x...); },
      [](auto... x) { correct_inverse(SerialTeam(), x...); },
      [](auto... x) { return norm_and_weights(SerialTeam(), x...); },
      [](auto... x) { leave_bases(SerialTeam(), x...); },
      [](auto... x) { return perturbation_size(SerialTeam(), x...); },
  };
}

}  // namespace
}  // namespace EFLAT_TARGET
}  // namespace eflat
