// An argument that is written must share no memory with any other, since blocks of all pairs are
// computed in any order; but E[i] may be ema[i].
#pragma once
#include <algorithm>
#include <vector>

#include "arguments.h"

namespace eflat {

// The memory of a call's arguments. Tensors that were copied to be contiguous are not in it.
class Overlaps {
 public:
  explicit Overlaps(size_t most) { ranges_.reserve(most); }
  void read(const void* at, int64_t bytes, const char* name, int64_t index) {
    add(at, bytes, name, index, false);
  }
  void written(const void* at, int64_t bytes, const char* name, int64_t index = -1) {
    add(at, bytes, name, index, true);
  }

  void check() {
    std::sort(ranges_.begin(), ranges_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    // The ranges so far that reach furthest.
    const Range *any = nullptr, *written = nullptr;
    for (const Range& r : ranges_) {
      const Range* other = r.written ? any : written;
      STD_TORCH_CHECK(!other || other->end <= r.begin, message(*other, r));
      if (!any || r.end > any->end) any = &r;
      if (r.written && (!written || r.end > written->end)) written = &r;
    }
  }

 private:
  struct Range {
    uintptr_t begin, end;
    const char* name;
    int index, order;  // of the arguments
    bool written;
  };

  void add(const void* at, int64_t bytes, const char* name, int64_t index, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(at);
    ranges_.push_back({begin, begin + bytes, name, int(index), int(ranges_.size()), written});
  }

  // The subject is the one that is written, the later argument of two.
  static std::string message(const Range& a, const Range& b) {
    const bool a_first = a.written == b.written ? a.order > b.order : a.written;
    const Range &subject = a_first ? a : b, &other = a_first ? b : a;
    return argument(subject.name, subject.index) + " must not share memory with " +
           argument(other.name, other.index) + ", since it is updated in place";
  }

  std::vector<Range> ranges_;
};

// counters: the steps of all A, then those of all B; none where pairs have no step.
inline void check_overlaps(const Arguments& arguments, const std::vector<float*>& counters,
                           const Tensor& skipped) {
  const int64_t count = arguments.pairs.size();
  Overlaps overlaps(14 * count + 1);
  for (int64_t l = 0; l < count; ++l) {
    const Pair& p = arguments.pairs[l];
    for (const Side* side : {&p.target, &p.other}) {
      const bool is_A = side->transposed;
      const int64_t elements = side->length * p.rank, bytes = elements * size_of(p.dtype),
                    out_bytes = elements * size_of(p.out_dtype), of_factor = is_A ? l : count + l;
      if (side->out) {
        const int64_t i = arguments.settings.onto == Onto::both ? of_factor : l;
        overlaps.written(side->out, out_bytes, "ema", i);
        if (side->added && side->added != side->out)  // it may be the average itself
          overlaps.read(side->added, out_bytes, "E", i);
      }
      overlaps.read(side->grad, bytes, is_A ? "grad_A" : "grad_B", l);
      if (!side->step) {
        overlaps.read(side->factor, bytes, is_A ? "A" : "B", l);
        continue;
      }
      overlaps.written(side->factor, bytes, is_A ? "A" : "B", l);
      overlaps.written(side->step->exp_avg, bytes, "exp_avg", of_factor);
      overlaps.written(side->step->exp_avg_sq, bytes, "exp_avg_sq", of_factor);
      overlaps.written(counters[of_factor], sizeof(float), "step", of_factor);
    }
  }
  overlaps.written(skipped.const_data_ptr(), sizeof(int64_t), "skipped");
  overlaps.check();
}

}  // namespace eflat
