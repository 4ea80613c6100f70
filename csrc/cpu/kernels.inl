// The vectorised inner loops. Included by kernels_{baseline,avx2,avx512}.cpp, which set
//   EFLAT_TARGET   the inline namespace that keeps the three apart
//   EFLAT_LANES    float64 lanes of a vector
//   EFLAT_VECTORS  a register tile has kTile x EFLAT_VECTORS vectors of sums
// and the compiler's target. No inline function of the standard library may be called here: the
// linker would keep one copy of it for all, perhaps one that this processor cannot run.
//
// Everything works on packed columns: a chunk of [factor | grad] rows, converted to float64,
//
//     z[j * ld + k],  j < 2r,  k < count,  zeros up to a multiple of kTile columns and of a vector
//
// so that a vector holds one column of kLanes rows. A sum over rows then needs no lane of any
// vector but its own until the very end, and of the symmetric z^T z exactly the upper triangle is
// computed, whatever the rank. A (r, m) is stored so already; B (n, r) is transposed on the way.
// Per two vectors loaded, gram and product do EFLAT_VECTORS fused multiply-adds or more: they run
// at the rate of the multiply-add units.

#include "vectors.inl"

namespace eflat {
inline namespace EFLAT_TARGET {
namespace {

constexpr int kVectors = EFLAT_VECTORS;
using cpu::kChunk, cpu::kFewestRows, cpu::kMostRows, cpu::kTile;

constexpr int pad(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of a chunk: it stays in the L2 cache, kTile columns of it in the L1 cache.
int chunk_rows(int columns) {
  int rows = kMostRows;
  while (rows > kFewestRows && rows * columns > kChunk) rows /= 2;
  return rows;
}
// Columns start at different places of a cache's sets.
int leading_dimension(int chunk) { return chunk + 8; }

// Columns of a row-major factor that are transposed together.
int block_columns(int r) { return r < kLanes && (r & (r - 1)) == 0 ? r : kLanes; }

// z[j * ld + k] = x[k * r + j], x row-major, for whole vectors of rows and for N columns at a time,
// perhaps in another order of the rows within a vector. `readable` elements of x may be read.
template <int N, class T>
void pack_rows(const T* x, int64_t readable, int r, int count, double* z, int ld) {
  const int step = N < kLanes ? kLanes : r;  // N < kLanes: r = N
  int k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int j = 0; j < r; j += N) {
      const int64_t first = int64_t(k) * r + j;
      const int columns = r - j < N ? r - j : N;
      if (first + int64_t(N - 1) * step + kLanes > readable) {
        for (int i = 0; i < columns; ++i)
          for (int l = 0; l < kLanes; ++l)
            z[(j + i) * int64_t(ld) + k + l] = to_double(x[first + int64_t(l) * r + i]);
        continue;
      }
      typename Loaded<T>::type rows[N];
      unrolled<N>([&](int i) EFLAT_INLINE { rows[i] = load(x + first + int64_t(i) * step); });
      transpose(rows);
      unrolled<N>([&](int i) EFLAT_INLINE {
        if (i < columns) at(z + (j + i) * int64_t(ld) + k) = widen(rows[i]);
      });
    }
  }
  for (int j = 0; j < r; ++j)
    for (int l = k; l < count; ++l) z[j * int64_t(ld) + l] = to_double(x[int64_t(l) * r + j]);
}

// z[j * ld + k] = x[j * length + k]: a transposed factor.
template <class T>
void pack_columns(const T* x, int64_t length, int r, int count, double* z, int ld) {
  for (int j = 0; j < r; ++j, x += length, z += ld) {
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) at(z + k) = widen(load(x + k));
    for (; k < count; ++k) z[k] = to_double(x[k]);
  }
}

template <class T>
void pack(const void* factor, const Side& side, int r, int64_t begin, int count, double* z,
          int ld) {
  const T* x = static_cast<const T*>(factor);
  if (side.transposed) return pack_columns(x + begin, side.length, r, count, z, ld);
  const int64_t readable = (side.length - begin) * r;
  x += begin * r;
  if (block_columns(r) == kLanes) return pack_rows<kLanes>(x, readable, r, count, z, ld);
  if constexpr (kLanes > 4)
    if (r == 4) return pack_rows<4>(x, readable, r, count, z, ld);
  if constexpr (kLanes > 2)
    if (r == 2) return pack_rows<2>(x, readable, r, count, z, ld);
  pack_rows<1>(x, readable, r, count, z, ld);
}

// By type, with zeros for the rows that fill the last vector; those for columns are the caller's.
void pack(const Side& side, DType dtype, int r, int64_t begin, int count, double* z, int ld) {
  const int rows = pad(count, kLanes);
  for (const void* x : {side.factor, side.grad}) {
    if (!x) continue;
    switch (dtype) {
      case DType::f64:
        pack<double>(x, side, r, begin, count, z, ld);
        break;
      case DType::f32:
        pack<float>(x, side, r, begin, count, z, ld);
        break;
      case DType::bf16:
        pack<bf16>(x, side, r, begin, count, z, ld);
        break;
      case DType::f16:
        pack<f16>(x, side, r, begin, count, z, ld);
        break;
    }
    for (int j = 0; j < r; ++j, z += ld)
      for (int k = count; k < rows; ++k) z[k] = 0;
  }
}

void zero(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

// out[i * ldo + j] += sum over k of x[i * ld + k] y[j * ld + k], for a tile of it.
template <int V>
void gram_tile(const double* x, const double* y, int ld, int count, double* out, int ldo) {
  Vec sum[kTile * V];
  unrolled<kTile * V>([&](int i) EFLAT_INLINE { sum[i] = Vec{}; });
  for (int k = 0; k < count; k += kLanes) {
    Vec column[V];
    unrolled<V>([&](int v) EFLAT_INLINE { column[v] = at(y + v * int64_t(ld) + k); });
    unrolled<kTile>([&](int i) EFLAT_INLINE {
      const Vec row = at(x + i * int64_t(ld) + k);
      unrolled<V>([&](int v) EFLAT_INLINE { sum[i * V + v] += row * column[v]; });
    });
  }
  unrolled<kTile * V / kLanes>([&](int i) EFLAT_INLINE { add_lanes(sum + i * kLanes); });
  unrolled<kTile * V>([&](int i) EFLAT_INLINE {
    out[i / V * ldo + i % V] += sum[i / kLanes * kLanes][i % kLanes];
  });
}

// The same for x = y and the upper triangle.
void gram_triangle(const double* x, int ld, int count, double* out, int ldo) {
  constexpr int kSums = pad(kTile * (kTile + 1) / 2, kLanes);
  Vec sum[kSums];
  unrolled<kSums>([&](int i) EFLAT_INLINE { sum[i] = Vec{}; });
  for (int k = 0; k < count; k += kLanes) {
    Vec column[kTile];
    unrolled<kTile>([&](int i) EFLAT_INLINE { column[i] = at(x + i * int64_t(ld) + k); });
    unrolled<kTile>([&](int j) EFLAT_INLINE {
      unrolled<kTile>([&](int i) EFLAT_INLINE {
        if (i <= j) sum[j * (j + 1) / 2 + i] += column[i] * column[j];
      });
    });
  }
  unrolled<kSums / kLanes>([&](int i) EFLAT_INLINE { add_lanes(sum + i * kLanes); });
  unrolled<kTile>([&](int j) EFLAT_INLINE {
    unrolled<kTile>([&](int i) EFLAT_INLINE {
      const int s = j * (j + 1) / 2 + i;
      if (i <= j) out[i * ldo + j] += sum[s / kLanes * kLanes][s % kLanes];
    });
  });
}

// out (columns, columns) += z^T z, upper triangle; columns: a multiple of kTile.
void add_gram(const double* z, int ld, int columns, int count, double* out) {
  for (int i = 0; i < columns; i += kTile) {
    const double* x = z + i * int64_t(ld);
    gram_triangle(x, ld, count, out + i * columns + i, columns);
    for (int j = i + kTile; j < columns; j += kVectors)
      gram_tile<kVectors>(x, z + j * int64_t(ld), ld, count, out + i * columns + j, columns);
  }
}

// Both halves of the padded sum, without padding.
void symmetrise(const double* padded, int ld, int n, double* gram) {
  for (int i = 0; i < n; ++i)
    for (int j = i; j < n; ++j) gram[i * n + j] = gram[j * n + i] = padded[i * ld + j];
}

// out[j * ld + k] = sum over i of z[i * ld + k] w[i * kTile + j] for V vectors of k.
template <int V>
void product_tile(const double* z, int ld, int depth, const double* w, double* out) {
  Vec sum[kTile * V];
  unrolled<kTile * V>([&](int i) EFLAT_INLINE { sum[i] = Vec{}; });
  for (int i = 0; i < depth; ++i, z += ld, w += kTile) {
    Vec row[V];
    unrolled<V>([&](int v) EFLAT_INLINE { row[v] = at(z + v * kLanes); });
    unrolled<kTile>([&](int j) EFLAT_INLINE {
      unrolled<V>([&](int v) EFLAT_INLINE { sum[j * V + v] += w[j] * row[v]; });
    });
  }
  unrolled<kTile * V>(
      [&](int i) EFLAT_INLINE { at(out + i / V * int64_t(ld) + i % V * kLanes) = sum[i]; });
}

// out (count, columns) = z (count, depth) * w (depth, columns), packed as below.
void product(const double* z, int ld, int count, int depth, const double* w, int columns,
             double* out) {
  int k = 0;
  for (; k + kVectors * kLanes <= count; k += kVectors * kLanes)
    for (int j = 0; j < columns; j += kTile)
      product_tile<kVectors>(z + k, ld, depth, w + j * depth, out + j * int64_t(ld) + k);
  for (; k < count; k += kLanes)
    for (int j = 0; j < columns; j += kTile)
      product_tile<1>(z + k, ld, depth, w + j * depth, out + j * int64_t(ld) + k);
}

// w (depth, columns) by kTile columns, with zeros up to a multiple of them.
void pack_weights(const double* w, int depth, int columns, double* packed) {
  for (int j = 0; j < columns; j += kTile)
    for (int i = 0; i < depth; ++i)
      for (int c = j; c < j + kTile; ++c) *packed++ = c < columns ? w[i * columns + c] : 0;
}

void gram(const Side& side, DType dtype, int r, int64_t begin, int64_t end, double* out,
          double* scratch) {
  const int width = side.grad ? 2 * r : r, columns = pad(width, kTile);
  const int chunk = chunk_rows(columns), ld = leading_dimension(chunk);
  double* z = scratch;
  double* padded = z + int64_t(columns) * ld;
  zero(z + int64_t(width) * ld, int64_t(columns - width) * ld);
  zero(padded, int64_t(columns) * columns);
  for (int64_t k = begin; k < end; k += chunk) {
    const int count = int(end - k < chunk ? end - k : chunk);
    pack(side, dtype, r, k, count, z, ld);
    add_gram(z, ld, columns, count, padded);
  }
  symmetrise(padded, columns, width, out);
}

void second_gram(const Side& side, DType dtype, int r, const double* T, const double* T_grad,
                 int64_t begin, int64_t end, double* out, double* scratch) {
  const int columns = pad(2 * r, kTile), half = pad(r, kTile);
  const int chunk = chunk_rows(columns), ld = leading_dimension(chunk);
  double* z = scratch;
  double* y = z + int64_t(columns) * ld;
  double* w = y + int64_t(columns + kTile) * ld;  // a product may write kTile - 1 columns too many
  double* w_grad = w + half * r;
  double* padded = w_grad + half * r;
  pack_weights(T, r, r, w);
  pack_weights(T_grad, r, r, w_grad);
  zero(padded, int64_t(columns) * columns);
  for (int64_t k = begin; k < end; k += chunk) {
    const int count = int(end - k < chunk ? end - k : chunk);
    pack(side, dtype, r, k, count, z, ld);
    product(z, ld, count, r, w, r, y);
    product(z + int64_t(r) * ld, ld, count, r, w_grad, r, y + int64_t(r) * ld);
    zero(y + int64_t(2 * r) * ld, int64_t(columns - 2 * r) * ld);
    add_gram(y, ld, columns, count, padded);
  }
  symmetrise(padded, columns, 2 * r, out);
}

template <class V>
EFLAT_HD V average(const V& out, const V& e, double beta) {
  return (1 - beta) * out + beta * e;
}
template <class T>
EFLAT_HD void store(T* out, double e, Update update) {
  *out = from_double<T>(update.average ? average(to_double(*out), e, update.beta) : e);
}

// The inverse of pack_rows.
template <int N, class T>
void store_rows(const double* e, int ld, int count, int r, double scale, Update update, T* out) {
  const int step = N < kLanes ? kLanes : r;
  int k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    T* first = out + int64_t(k) * r;
    int j = 0;
    for (; j + N <= r; j += N) {
      T* to = first + j;
      const double* from = e + j * int64_t(ld) + k;
      typename Loaded<T>::type rows[N];
      if (update.average) {
        unrolled<N>([&](int i) EFLAT_INLINE { rows[i] = load(to + int64_t(i) * step); });
        transpose(rows);
        unrolled<N>([&](int i) EFLAT_INLINE {
          narrow(average(widen(rows[i]), scale * at(from + i * int64_t(ld)), update.beta), rows[i]);
        });
      } else {
        unrolled<N>([&](int i)
                        EFLAT_INLINE { narrow(scale * at(from + i * int64_t(ld)), rows[i]); });
      }
      transpose(rows);
      unrolled<N>([&](int i) EFLAT_INLINE { save(rows[i], to + int64_t(i) * step); });
    }
    for (; j < r; ++j)
      for (int l = 0; l < kLanes; ++l)
        store(first + int64_t(l) * r + j, scale * e[j * int64_t(ld) + k + l], update);
  }
  for (; k < count; ++k)
    for (int j = 0; j < r; ++j)
      store(out + int64_t(k) * r + j, scale * e[j * int64_t(ld) + k], update);
}

template <class T>
void store_columns(const double* e, int ld, int count, int r, int64_t length, double scale,
                   Update update, T* out) {
  for (int j = 0; j < r; ++j, e += ld, out += length) {
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      Vec value = scale * at(e + k);
      if (update.average) value = average(widen(load(out + k)), value, update.beta);
      typename Loaded<T>::type narrowed;
      narrow(value, narrowed);
      save(narrowed, out + k);
    }
    for (; k < count; ++k) store(out + k, scale * e[k], update);
  }
}

template <class T>
void store_chunk(const double* e, int ld, int count, int r, const Side& side, int64_t begin,
                 double scale, Update update, T* out) {
  if (side.transposed)
    return store_columns(e, ld, count, r, side.length, scale, update, out + begin);
  out += begin * r;
  if (block_columns(r) == kLanes) return store_rows<kLanes>(e, ld, count, r, scale, update, out);
  if constexpr (kLanes > 4)
    if (r == 4) return store_rows<4>(e, ld, count, r, scale, update, out);
  if constexpr (kLanes > 2)
    if (r == 2) return store_rows<2>(e, ld, count, r, scale, update, out);
  store_rows<1>(e, ld, count, r, scale, update, out);
}

void apply(const Side& side, DType dtype, int r, int64_t begin, int64_t end, const double* weights,
           double scale, Update update, void* out, DType out_dtype, double* scratch) {
  const int columns = pad(r, kTile), chunk = chunk_rows(2 * r), ld = leading_dimension(chunk);
  double* z = scratch;
  double* e = z + int64_t(2 * r) * ld;
  double* w = e + int64_t(columns) * ld;
  pack_weights(weights, 2 * r, r, w);
  for (int64_t k = begin; k < end; k += chunk) {
    const int count = int(end - k < chunk ? end - k : chunk);
    pack(side, dtype, r, k, count, z, ld);
    product(z, ld, count, 2 * r, w, r, e);
    switch (out_dtype) {
      case DType::f64:
        store_chunk(e, ld, count, r, side, k, scale, update, static_cast<double*>(out));
        break;
      case DType::f32:
        store_chunk(e, ld, count, r, side, k, scale, update, static_cast<float*>(out));
        break;
      case DType::bf16:
        store_chunk(e, ld, count, r, side, k, scale, update, static_cast<bf16*>(out));
        break;
      case DType::f16:
        store_chunk(e, ld, count, r, side, k, scale, update, static_cast<f16*>(out));
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
