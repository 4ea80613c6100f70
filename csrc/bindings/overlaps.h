// What an operator writes must share no memory with anything else it is given, since blocks of all
// pairs are computed in any order; but E[i] may be ema[i].
#pragma once
#include <algorithm>
#include <bit>
#include <vector>

#include "arguments.h"

namespace eflat {

// The memory of a call's arguments. Tensors that were copied to be contiguous are not in it.
class Overlaps {
 public:
  explicit Overlaps(size_t most) {
    ranges_.reserve(most);
    starts_.reserve(most);
  }
  void read(const void* at, int64_t bytes, const char* name, int64_t index) {
    add(at, bytes, name, index, false);
  }
  void written(const void* at, int64_t bytes, const char* name, int64_t index = -1) {
    add(at, bytes, name, index, true);
  }

  void check() {
    sort();
    // Of the ranges so far, those that reach furthest.
    const Range *any = nullptr, *written = nullptr;
    for (const Start& start : starts_) {
      const Range& r = ranges_[start.range];
      const Range* other = r.written ? any : written;
      STD_TORCH_CHECK(!other || other->end <= start.at, message(*other, r));
      if (!any || r.end > any->end) any = &r;
      if (r.written && (!written || r.end > written->end)) written = &r;
    }
  }

 private:
  struct Range {
    uintptr_t end;
    const char* name;
    int index;
    bool written;
  };
  struct Start {
    uintptr_t at;
    size_t range;
  };

  void add(const void* at, int64_t bytes, const char* name, int64_t index, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(at);
    starts_.push_back({begin, ranges_.size()});
    ranges_.push_back({begin + bytes, name, int(index), written});
  }

  // By address, digit by digit with about as many buckets as ranges: for hundreds of pairs several
  // times faster than comparisons, whose branches nothing predicts.
  void sort() {
    const auto [least, most] = std::minmax_element(
        starts_.begin(), starts_.end(), [](const Start& a, const Start& b) { return a.at < b.at; });
    const uintptr_t base = least->at, span = most->at - base;
    const int bits = std::min(int(std::bit_width(starts_.size())), 11);
    std::vector<Start> sorted(starts_.size());
    for (int shift = 0; shift < 64 && span >> shift; shift += bits) {
      auto digit = [=](const Start& s) { return (s.at - base) >> shift & ((1 << bits) - 1); };
      std::vector<uint32_t> next((1 << bits) + 1);
      for (const Start& s : starts_) ++next[digit(s) + 1];
      for (size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
      for (const Start& s : starts_) sorted[next[digit(s)]++] = s;
      starts_.swap(sorted);
    }
  }

  static std::string message(const Range& a, const Range& b) {
    const bool a_first = a.written == b.written ? &a > &b : a.written;
    const Range &subject = a_first ? a : b, &other = a_first ? b : a;
    return argument(subject.name, subject.index) + " must not share memory with " +
           argument(other.name, other.index) + ", since it is updated in place";
  }

  std::vector<Range> ranges_;  // in the order of the arguments
  std::vector<Start> starts_;
};

// counters: the steps of all A, then those of all B; none where pairs have no step.
inline void check_overlaps(const Arguments& arguments, const std::vector<float*>& counters,
                           const Tensor& skipped) {
  const int64_t count = arguments.pairs.size();
  Overlaps overlaps(14 * count + 1);
  const bool onto_B = arguments.onto_B, both = arguments.both;
  for (int64_t l = 0; l < count; ++l) {
    const Pair& p = arguments.pairs[l];
    for (bool is_target : {true, false}) {
      const Side& side = is_target ? p.target : p.other;
      const bool is_B = is_target == onto_B;
      const int64_t elements = side.length * p.rank, bytes = elements * size_of(p.dtype),
                    i = is_B ? count + l : l;
      if (const void* out = is_target ? p.out : p.out_other) {
        overlaps.written(out, elements * size_of(p.out_dtype), "ema", both ? i : l);
        if (side.added && side.added != out)  // it may be the average itself
          overlaps.read(side.added, elements * size_of(p.out_dtype), "E", both ? i : l);
      }
      overlaps.read(side.grad, bytes, is_B ? "grad_B" : "grad_A", l);
      if (!p.step) {
        overlaps.read(side.factor, bytes, is_B ? "B" : "A", l);
        continue;
      }
      const AdamW& a = is_target ? p.step->target : p.step->other;
      overlaps.written(a.factor, bytes, is_B ? "B" : "A", l);
      overlaps.written(a.exp_avg, bytes, "exp_avg", i);
      overlaps.written(a.exp_avg_sq, bytes, "exp_avg_sq", i);
      overlaps.written(counters[i], sizeof(float), "step", i);
    }
  }
  overlaps.written(skipped.const_data_ptr(), sizeof(int64_t), "skipped");
  overlaps.check();
}

}  // namespace eflat
