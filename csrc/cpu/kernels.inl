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

#include "pack.inl"

namespace eflat {
inline namespace EFLAT_TARGET {
namespace {

constexpr int kVectors = EFLAT_VECTORS;

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
    unrolled<V>([&](int v) EFLAT_INLINE { column[v] = load(y + v * int64_t(ld) + k); });
    unrolled<kTile>([&](int i) EFLAT_INLINE {
      const Vec row = load(x + i * int64_t(ld) + k);
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
    unrolled<kTile>([&](int i) EFLAT_INLINE { column[i] = load(x + i * int64_t(ld) + k); });
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
void add_gram(const double* z, int ld, int columns, int count, double* out, Ahead ahead) {
  for (int i = 0; i < columns; i += kTile) {
    const double* x = z + i * int64_t(ld);
    ahead.fetch();
    gram_triangle(x, ld, count, out + i * columns + i, columns);
    for (int j = i + kTile; j < columns; j += kVectors) {
      ahead.fetch();
      gram_tile<kVectors>(x, z + j * int64_t(ld), ld, count, out + i * columns + j, columns);
    }
  }
}

// The rows after a chunk, in as many parts as add_gram has tiles.
Ahead next_rows(const Side& side, DType dtype, int r, int columns, int64_t begin, int count) {
  const int rows = columns / kTile;
  Ahead ahead(rows + rows * (rows - 1) / 2 * (kTile / kVectors));
  ahead.add_side(side, dtype, r, begin, count);
  return ahead;
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
    unrolled<V>([&](int v) EFLAT_INLINE { row[v] = load(z + v * kLanes); });
    unrolled<kTile>([&](int j) EFLAT_INLINE {
      unrolled<V>([&](int v) EFLAT_INLINE { sum[j * V + v] += w[j] * row[v]; });
    });
  }
  unrolled<kTile * V>(
      [&](int i) EFLAT_INLINE { save(sum[i], out + i / V * int64_t(ld) + i % V * kLanes); });
}

// out (count, columns) = z (count, depth) * w (depth, columns), packed as below.
void product(const double* z, int ld, int count, int depth, const double* w, int columns,
             double* out, Ahead ahead) {
  int k = 0;
  for (; k + kVectors * kLanes <= count; k += kVectors * kLanes) {
    ahead.fetch();
    for (int j = 0; j < columns; j += kTile)
      product_tile<kVectors>(z + k, ld, depth, w + j * depth, out + j * int64_t(ld) + k);
  }
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
    add_gram(z, ld, columns, count, padded, next_rows(side, dtype, r, columns, k + chunk, chunk));
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
    product(z, ld, count, r, w, r, y, Ahead(1));
    product(z + int64_t(r) * ld, ld, count, r, w_grad, r, y + int64_t(r) * ld, Ahead(1));
    zero(y + int64_t(2 * r) * ld, int64_t(columns - 2 * r) * ld);
    add_gram(y, ld, columns, count, padded, next_rows(side, dtype, r, columns, k + chunk, chunk));
  }
  symmetrise(padded, columns, 2 * r, out);
}

void apply(const Side& side, DType dtype, int r, int64_t begin, int64_t end, const double* weights,
           double scale, Update update, DType out_dtype, double* scratch) {
  const int columns = pad(r, kTile), chunk = chunk_rows(2 * r), ld = leading_dimension(chunk);
  double* z = scratch;
  double* e = z + int64_t(2 * r) * ld;
  double* w = e + int64_t(columns) * ld;
  pack_weights(weights, 2 * r, r, w);
  for (int64_t k = begin; k < end; k += chunk) {
    const int count = int(end - k < chunk ? end - k : chunk);
    pack(side, dtype, r, k, count, z, ld);
    Ahead ahead(chunk / (kVectors * kLanes));
    if (side.out != side.added) ahead.add(side.out, side, size_of(out_dtype), r, k, count);
    ahead.add_side(side, dtype, r, k + chunk, chunk);
    product(z, ld, count, 2 * r, w, r, e, ahead);
    switch (out_dtype) {
      case DType::f64:
        store_chunk<double>(e, ld, count, r, side, k, scale, update);
        break;
      case DType::f32:
        store_chunk<float>(e, ld, count, r, side, k, scale, update);
        break;
      case DType::bf16:
        store_chunk<bf16>(e, ld, count, r, side, k, scale, update);
        break;
      case DType::f16:
        store_chunk<f16>(e, ld, count, r, side, k, scale, update);
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
      [](auto... x) { return tangent_norm_and_weights(SerialTeam(), x...); },
      [](auto... x) { leave_bases(SerialTeam(), x...); },
      [](auto... x) { return perturbation_size(SerialTeam(), x...); },
  };
}

}  // namespace
}  // namespace EFLAT_TARGET
}  // namespace eflat
