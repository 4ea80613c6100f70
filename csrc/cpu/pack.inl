// Rows of a side, as they lie in memory, to packed columns (see kernels.inl) and back. Included by
// kernels.inl, once per instruction set.
#include "vectors.inl"

namespace eflat {
inline namespace EFLAT_TARGET {
namespace {

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

// Elements of a matrix, one by one or a vector of them.
template <class T>
struct Plain {
  const T* x;
  Plain operator+(int64_t i) const { return {x + i}; }
  double operator[](int64_t i) const { return to_double(x[i]); }
  EFLAT_HD auto vector(int64_t i) const { return load(x + i); }
};
// The same of a factor that something was added to.
template <class T>
struct Point {
  const T* x;
  const typename AddedTo<T>::type* added;
  Point operator+(int64_t i) const { return {x + i, added + i}; }
  double operator[](int64_t i) const { return to_double(point(x[i], added[i])); }
  EFLAT_HD auto vector(int64_t i) const { return rounded(load(x + i) + load(added + i), T()); }
};

// z[j * ld + k] = x[k * r + j], x row-major, for whole vectors of rows and for N columns at a time,
// perhaps in another order of the rows within a vector. `readable` elements of x may be read.
template <int N, class Elements>
void pack_rows(Elements x, int64_t readable, int r, int count, double* z, int ld) {
  const int step = N < kLanes ? kLanes : r;  // N < kLanes: r = N
  int k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int j = 0; j < r; j += N) {
      const int64_t first = int64_t(k) * r + j;
      const int columns = r - j < N ? r - j : N;
      if (first + int64_t(N - 1) * step + kLanes > readable) {
        for (int i = 0; i < columns; ++i)
          for (int l = 0; l < kLanes; ++l)
            z[(j + i) * int64_t(ld) + k + l] = x[first + int64_t(l) * r + i];
        continue;
      }
      decltype(x.vector(0)) rows[N];
      unrolled<N>([&](int i) EFLAT_INLINE { rows[i] = x.vector(first + int64_t(i) * step); });
      transpose(rows);
      unrolled<N>([&](int i) EFLAT_INLINE {
        if (i < columns) save(widen(rows[i]), z + (j + i) * int64_t(ld) + k);
      });
    }
  }
  for (int j = 0; j < r; ++j)
    for (int l = k; l < count; ++l) z[j * int64_t(ld) + l] = x[int64_t(l) * r + j];
}

// z[j * ld + k] = x[j * length + k]: a transposed factor.
template <class Elements>
void pack_columns(Elements x, int64_t length, int r, int count, double* z, int ld) {
  for (int j = 0; j < r; ++j, x = x + length, z += ld) {
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) save(widen(x.vector(k)), z + k);
    for (; k < count; ++k) z[k] = x[k];
  }
}

// Rows [begin, begin + count); `readable` rows from `begin` on may be read.
template <class Elements>
void pack(Elements x, const Side& side, int64_t readable, int r, int64_t begin, int count,
          double* z, int ld) {
  if (side.transposed) return pack_columns(x + begin, side.length, r, count, z, ld);
  readable *= r;
  x = x + begin * r;
  if (block_columns(r) == kLanes) return pack_rows<kLanes>(x, readable, r, count, z, ld);
  if constexpr (kLanes > 4)
    if (r == 4) return pack_rows<4>(x, readable, r, count, z, ld);
  if constexpr (kLanes > 2)
    if (r == 2) return pack_rows<2>(x, readable, r, count, z, ld);
  pack_rows<1>(x, readable, r, count, z, ld);
}

template <class T>
void pack(const Side& side, int r, int64_t begin, int count, double* z, int ld) {
  const T* factor = static_cast<const T*>(side.factor);
  const int64_t left = side.length - begin;
  if (side.added) {
    // Other threads may be writing the rows beyond: what was added may be a moving average.
    const auto* added = static_cast<const typename AddedTo<T>::type*>(side.added);
    pack(Point<T>{factor, added}, side, count, r, begin, count, z, ld);
  } else {
    pack(Plain<T>{factor}, side, left, r, begin, count, z, ld);
  }
  if (!side.grad) return;
  const Plain<T> grad{static_cast<const T*>(side.grad)};
  pack(grad, side, left, r, begin, count, z + r * int64_t(ld), ld);
}

// By type, with zeros for the rows that fill the last vector; those for columns are the caller's.
void pack(const Side& side, DType dtype, int r, int64_t begin, int count, double* z, int ld) {
  switch (dtype) {
    case DType::f64:
      pack<double>(side, r, begin, count, z, ld);
      break;
    case DType::f32:
      pack<float>(side, r, begin, count, z, ld);
      break;
    case DType::bf16:
      pack<bf16>(side, r, begin, count, z, ld);
      break;
    case DType::f16:
      pack<f16>(side, r, begin, count, z, ld);
      break;
  }
  const int rows = pad(count, kLanes);
  for (int j = 0; j < (side.grad ? 2 * r : r); ++j, z += ld)
    for (int k = count; k < rows; ++k) z[k] = 0;
}

// Memory that is wanted next, on its way into the cache while the last rows are computed with.
class Ahead {
 public:
  explicit Ahead(int parts) : parts_(parts) {}

  // Rows [begin, begin + count) of a matrix like a side's factor.
  void add(const void* x, const Side& side, int64_t size, int r, int64_t begin, int64_t count) {
    const int64_t left = side.length - begin, row = side.transposed ? size : size * r;
    const int64_t bytes = (count < left ? count : left) * row;
    if (!x || bytes <= 0) return;
    areas_[count_++] = {static_cast<const char*>(x) + begin * row, side.length * size,
                        (bytes + kLine - 1) / kLine, side.transposed ? r : 1};
    lines_ += areas_[count_ - 1].lines * areas_[count_ - 1].runs;
  }
  void add_side(const Side& side, DType dtype, int r, int64_t begin, int64_t count) {
    add(side.factor, side, size_of(dtype), r, begin, count);
    add(side.added, side, size_of(added_to(dtype)), r, begin, count);
    add(side.grad, side, size_of(dtype), r, begin, count);
  }
  // One of `parts` parts of it.
  void fetch() {
    const int64_t end = ++part_ * lines_ / parts_;
    while (fetched_ < end) {
      const Area& a = areas_[area_];
      int64_t n = a.lines - line_ < end - fetched_ ? a.lines - line_ : end - fetched_;
      const char* x = a.first + run_ * a.stride + line_ * kLine;
      fetched_ += n;
      line_ += n;
      for (; n > 0; --n, x += kLine) __builtin_prefetch(x, 0, 2);
      if (line_ == a.lines) {
        line_ = 0;
        if (++run_ == a.runs) run_ = 0, ++area_;
      }
    }
  }

 private:
  static constexpr int kLine = 64;
  struct Area {
    const char* first;
    int64_t stride, lines;
    int runs;
  };
  Area areas_[4];
  int count_ = 0, area_ = 0, run_ = 0, parts_;
  int64_t lines_ = 0, line_ = 0, fetched_ = 0, part_ = 0;
};

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
          narrow(average(widen(rows[i]), scale * load(from + i * int64_t(ld)), update.beta),
                 rows[i]);
        });
      } else {
        unrolled<N>([&](int i)
                        EFLAT_INLINE { narrow(scale * load(from + i * int64_t(ld)), rows[i]); });
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
      Vec value = scale * load(e + k);
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
                 double scale, Update update) {
  T* out = static_cast<T*>(side.out);
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

}  // namespace
}  // namespace EFLAT_TARGET
}  // namespace eflat
