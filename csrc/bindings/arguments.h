// Tensors → Problem, with every argument checked before anything is computed.
//
// The stable ABI can only throw RuntimeError; eflat_ext/ops turns these into ValueError and
// TypeError. Messages name the argument, what was given and what was expected.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../core/pairs.h"

namespace eflat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

// The type of any tensor: Tensor::scalar_type knows no quantized types, nor those of a few bits.
inline ScalarType type_of(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return static_cast<ScalarType>(type);
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "a type that is none of float64, float32, bfloat16, float16";
  }
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

// "A" of perturb, "A[3]" of the foreach form.
inline std::string argument(const char* name, int64_t index) {
  return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
}

inline DType checked_dtype(const Tensor& t, const std::string& name) {
  switch (type_of(t)) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16, got ",
                      dtype_name(type_of(t)));
  }
}

inline std::string device_name(const Tensor& t) {
  const auto device = t.device();
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU:
      return "cpu";
    case torch::headeronly::DeviceType::CUDA:
      return "cuda:" + std::to_string(int(device.index()));
    case torch::headeronly::DeviceType::Meta:
      return "meta";
    default:
      return "a device that is none of cpu, cuda, meta";
  }
}

inline void check_device(const Tensor& t, const std::string& name, const Tensor& like,
                         const std::string& like_name) {
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the device of ", like_name, ", ",
                  device_name(like), ", got ", device_name(t));
}

inline void check_shape_and_device(const Tensor& t, const std::string& name, const Tensor& like,
                                   const std::string& like_name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of ", like_name, ", ", shape_of(like), ", got ",
                  shape_of(t));
  check_device(t, name, like, like_name);
}

inline void check_dtype(const Tensor& t, const std::string& name, const Tensor& like,
                        const std::string& like_name) {
  STD_TORCH_CHECK(type_of(t) == type_of(like), name, " must have the dtype of ", like_name, ", ",
                  dtype_name(type_of(like)), ", got ", dtype_name(type_of(t)));
}

// The storage must still hold the tensor: it may have been freed, as FSDP does between uses.
inline void check_memory(const Tensor& t, bool contiguous, const std::string& name) {
  int64_t last = t.storage_offset();
  if (contiguous) {
    last += t.numel() - 1;
  } else {
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  }
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  STD_TORCH_CHECK(t.numel() == 0 || (last + 1) * int64_t(t.element_size()) <= bytes, name,
                  " must lie within its storage, got a storage of ", bytes, " bytes");
}

// The memory of a tensor that is updated in place.
inline void* written(const Tensor& t, const std::string& name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous, since it is updated in place");
  check_memory(t, true, name);
  return t.mutable_data_ptr();
}

// Again in eflat_ext/reference.py; python_tests/ops/test_default_rtol.py compares the two.
inline double default_rtol(const Pair& p) {
  const double size = double(std::max({p.target.length, p.other.length, int64_t(p.rank)}));
  return p.dtype == DType::f64 ? std::max(1e-7, size * 2.220446049250313e-16)
                               : std::min(size * 1.1920928955078125e-07, 1e-3);
}

inline void check_length(const char* name, int64_t given, int64_t expected,
                         const char* entries = "one entry per pair, ") {
  STD_TORCH_CHECK(given == expected, name, " must have ", entries, expected, ", got ", given);
}
constexpr const char* kTwoEntries = "two entries per pair, all A and all B, ";

enum class Onto { B, A, both };

// The options that operators share.
struct Settings {
  double rho;
  Onto onto;
  bool global_norm;
  std::optional<double> rtol;
  double beta;

  Settings(double rho, const std::string& onto_name, const std::string& norm_scope,
           std::optional<double> rtol, double beta = 0)
      : rho(rho),
        onto(onto_name == "A"   ? Onto::A
             : onto_name == "B" ? Onto::B
                                : Onto::both),
        global_norm(norm_scope == "global"),
        rtol(rtol),
        beta(beta) {
    STD_TORCH_CHECK(onto != Onto::both || onto_name == "both",
                    "onto must be 'B', 'A' or 'both', got '", onto_name, "'");
    STD_TORCH_CHECK(global_norm || norm_scope == "layer",
                    "norm_scope must be 'layer' or 'global', got '", norm_scope, "'");
    STD_TORCH_CHECK(std::isfinite(rho) && rho >= 0, "rho must be finite and at least 0, got ", rho);
    STD_TORCH_CHECK(!rtol || (*rtol >= 1e-7 && *rtol < 1),
                    "rtol must be None or in [1e-7, 1), got ", rtol.value_or(0));
    STD_TORCH_CHECK(beta >= 0 && beta <= 1, "beta must be in [0, 1], got ", beta);
  }
};

// Pairs of factors with their gradients, an entry for each.
struct FactorLists {
  Tensors A, B, grad_A, grad_B;
  Numbers scaling;
  bool single = false;  // the one pair of `perturb`, whose arguments are no lists
};

// Moving averages of the perturbations, and what the forward pass has added to the factors (an
// empty list: nothing); an entry for each perturbed factor: onto both, those of all A and of all B.
struct AverageLists {
  Tensors E, ema;
  Tensor skipped;  // counts the pairs whose averages stay as they are
};

// The pairs of a call, and the contiguous tensors that keep their pointers alive.
class Arguments {
 public:
  const Settings settings;
  const FactorLists lists;
  std::vector<Pair> pairs;

  // max_rank: of the device's kernels.
  Arguments(int max_rank, Settings options, FactorLists factors = {})
      : settings(std::move(options)), lists(std::move(factors)), max_rank_(max_rank) {
    check_length("B", lists.B.size(), lists.A.size());
    check_length("grad_A", lists.grad_A.size(), lists.A.size());
    check_length("grad_B", lists.grad_B.size(), lists.A.size());
    check_length("scaling", lists.scaling.size(), lists.A.size());
    pairs.reserve(lists.A.size());
    kept_.reserve(6 * lists.A.size());
    for (size_t l = 0; l < lists.A.size(); ++l) add(l);
  }

  // Memory for the perturbations, an entry for each perturbed factor.
  Tensors new_perturbations() {
    Tensors E;
    for (size_t i = 0; i < perturbed_count(); ++i) {
      const Tensor& t = perturbed(i);
      E.push_back(torch::stable::new_empty(t, {t.size(0), t.size(1)}));
      side(i).out = E.back().mutable_data_ptr();
    }
    for (Pair& pair : pairs) pair.out_dtype = pair.dtype;
    return E;
  }

  void add_averages(const AverageLists& averages) {
    const Tensor& skipped = averages.skipped;
    STD_TORCH_CHECK(skipped.defined(), "skipped must be a tensor, got None");
    STD_TORCH_CHECK(type_of(skipped) == ScalarType::Long && skipped.dim() == 0,
                    "skipped must be an int64 tensor without dimensions, got ",
                    dtype_name(type_of(skipped)), " of shape ", shape_of(skipped));
    check_averages("ema", averages.ema);
    if (!averages.E.empty()) check_averages("E", averages.E);
    if (pairs.empty()) return;
    check_memory(skipped, true, "skipped");
    check_device(skipped, "skipped", lists.A[0], "A[0]");
    for (size_t i = 0; i < averages.ema.size(); ++i) {
      side(i).out = written(averages.ema[i], argument("ema", i));
      Pair& pair = pairs[i % pairs.size()];
      pair.out_dtype = added_to(pair.dtype);
    }
    // After the averages: one that is copied on write has its memory now.
    for (size_t i = 0; i < averages.E.size(); ++i)
      side(i).added = keep(averages.E[i], argument("E", i));
  }

  // Averages onto A and the B that they are to be applied beside, for foreach_bound.
  void add_averages_onto_A(const Tensors& ema, const Tensors& B, const Numbers& scaling) {
    check_length("B", B.size(), ema.size());
    check_length("scaling", scaling.size(), ema.size());
    for (size_t l = 0; l < ema.size(); ++l) {
      const std::string e = argument("ema", l), b = argument("B", l);
      Pair p = pair_of(ema[l], e, B[l], b, scaling[l], l);
      check_device(ema[l], e, ema[0], "ema[0]");
      check_device(B[l], b, ema[0], "ema[0]");
      p.dtype = checked_dtype(B[l], b);
      p.out_dtype = checked_dtype(ema[l], e);
      p.target = {keep(B[l], b), nullptr, B[l].size(0), false};
      p.other = {keep(ema[l], e), nullptr, ema[l].size(1), true};
      all_float64_ = all_float64_ && p.out_dtype == DType::f64;
      pairs.push_back(p);
    }
  }

  // Float64 when all factors are, else float32; without dimensions for a single pair.
  Tensor new_norms(const Tensor& like) const {
    std::vector<int64_t> shape;
    if (!lists.single) shape.push_back(pairs.size());
    const bool wide = all_float64_ && !pairs.empty();
    return torch::stable::new_empty(like, shape, wide ? ScalarType::Double : ScalarType::Float);
  }

  Problem problem(bool average) const {
    return {pairs.data(),         int(pairs.size()),        settings.rho,
            settings.global_norm, {average, settings.beta}, all_float64_ ? DType::f64 : DType::f32};
  }

 private:
  // Checks what does not depend on gradients, and gives rank and scaling. A: or an average onto it.
  Pair pair_of(const Tensor& A, const std::string& a, const Tensor& B, const std::string& b,
               double scaling, int64_t index) const {
    STD_TORCH_CHECK(A.dim() == 2, a, " must be 2-d, (r, m), got shape ", shape_of(A));
    STD_TORCH_CHECK(B.dim() == 2, b, " must be 2-d, (n, r), got shape ", shape_of(B));
    const int64_t r = A.size(0);
    STD_TORCH_CHECK(B.size(1) == r, b, " must be (n, r) for ", a,
                    " of shape (r, m) = ", shape_of(A), ", got shape ", shape_of(B));
    STD_TORCH_CHECK(r >= 1 && r <= max_rank_, "the rank of ", a, " must be 1 to ", max_rank_,
                    ", got ", r);
    STD_TORCH_CHECK(A.size(1) >= 1 && B.size(0) >= 1, a, " and ", b,
                    " must not be empty, got shapes ", shape_of(A), " and ", shape_of(B));
    STD_TORCH_CHECK(std::isfinite(scaling) && scaling != 0, argument("scaling", index),
                    " must be finite and not 0, got ", scaling);
    Pair p{};
    p.rank = int(r);
    p.scaling = scaling;
    return p;
  }

  void add(size_t l) {
    const int64_t index = lists.single ? -1 : int64_t(l);
    const Tensor &A = lists.A[l], &B = lists.B[l];
    const std::string a = argument("A", index), b = argument("B", index);
    Pair p = pair_of(A, a, B, b, lists.scaling[l], index);
    check_device(A, a, lists.A[0], "A[0]");
    p.dtype = checked_dtype(A, a);
    check_dtype(B, b, A, a);
    check_device(B, b, A, a);
    const Side side_A = side_of(A, a, lists.grad_A[l], argument("grad_A", index), true),
               side_B = side_of(B, b, lists.grad_B[l], argument("grad_B", index), false);
    p.target = settings.onto == Onto::A ? side_A : side_B;
    p.other = settings.onto == Onto::A ? side_B : side_A;
    p.rtol = settings.rtol.value_or(default_rtol(p));
    all_float64_ = all_float64_ && p.dtype == DType::f64;
    pairs.push_back(p);
  }

  Side side_of(const Tensor& factor, const std::string& name, const Tensor& grad,
               const std::string& grad_name, bool is_A) {
    check_shape_and_device(grad, grad_name, factor, name);
    check_dtype(grad, grad_name, factor, name);
    return {keep(factor, name), keep(grad, grad_name), factor.size(is_A ? 1 : 0), is_A};
  }

  const void* keep(const Tensor& t, const std::string& name) {
    const bool contiguous = t.is_contiguous();
    check_memory(t, contiguous, name);
    kept_.push_back(contiguous ? t : torch::stable::contiguous(t));
    return kept_.back().const_data_ptr();
  }

  // The perturbed factors: onto both, all A, then all B. Entry i of them, and its side.
  size_t perturbed_count() const { return pairs.size() * (settings.onto == Onto::both ? 2 : 1); }
  bool is_A(size_t i) const {
    return settings.onto == Onto::A || (settings.onto == Onto::both && i < pairs.size());
  }
  const Tensor& perturbed(size_t i) const {
    return (is_A(i) ? lists.A : lists.B)[i % pairs.size()];
  }
  Side& side(size_t i) {
    Pair& pair = pairs[i % pairs.size()];
    return is_A(i) && settings.onto == Onto::both ? pair.other : pair.target;
  }

  // A list of one entry for each perturbed factor.
  void check_averages(const char* name, const Tensors& tensors) const {
    if (settings.onto == Onto::both)
      check_length(name, tensors.size(), perturbed_count(), kTwoEntries);
    else
      check_length(name, tensors.size(), perturbed_count());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor &t = tensors[i], &like = perturbed(i);
      const std::string entry = argument(name, i),
                        like_name = argument(is_A(i) ? "A" : "B", i % pairs.size());
      check_shape_and_device(t, entry, like, like_name);
      const ScalarType expected =
          type_of(like) == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
      STD_TORCH_CHECK(type_of(t) == expected, entry, " must be ", dtype_name(expected), " for ",
                      dtype_name(type_of(like)), " factors, got ", dtype_name(type_of(t)));
    }
  }

  const int max_rank_;
  Tensors kept_;
  bool all_float64_ = true;
};

}  // namespace eflat
