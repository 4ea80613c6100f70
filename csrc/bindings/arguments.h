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

// Of any tensor: Tensor::scalar_type knows no quantized types, nor those of a few bits, nor None's.
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

// Of norms and factors, which are float64 or float32.
inline DType dtype_of(const Tensor& t) {
  return type_of(t) == ScalarType::Double ? DType::f64 : DType::f32;
}

inline void check_like(const Tensor& t, const std::string& name, const Tensor& like,
                       const std::string& like_name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of ", like_name, ", ", shape_of(like), ", got ",
                  shape_of(t));
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

inline void check_dtype_and_device(const Tensor& t, const std::string& name, const Tensor& like,
                                   const std::string& like_name) {
  STD_TORCH_CHECK(type_of(t) == type_of(like), name, " must have the dtype of ", like_name, ", ",
                  dtype_name(type_of(like)), ", got ", dtype_name(type_of(t)));
  check_device(t, name, like, like_name);
}

// Whether the storage still holds the tensor: it may have been freed, as FSDP does between uses.
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

inline double default_rtol(const Pair& p) {
  const double size = double(std::max({p.target.length, p.other.length, int64_t(p.rank)}));
  return p.dtype == DType::f64 ? std::max(1e-7, size * 2.220446049250313e-16)
                               : std::min(size * 1.1920928955078125e-07, 1e-3);
}

inline void check_length(const char* name, int64_t given, int64_t expected) {
  STD_TORCH_CHECK(given == expected, name, " must have one entry per pair, ", expected, ", got ",
                  given);
}

// The arguments that all operators share, and the contiguous tensors that keep pointers alive.
struct Arguments {
  std::vector<Pair> pairs;
  std::vector<Tensor> kept;
  bool onto_B;  // whether B is the target, as it is onto both
  bool both;
  bool global_norm;
  bool all_float64 = true;

  Arguments(const std::string& onto, const std::string& norm_scope, double rho,
            std::optional<double> rtol) {
    STD_TORCH_CHECK(onto == "B" || onto == "A" || onto == "both",
                    "onto must be 'B', 'A' or 'both', got '", onto, "'");
    STD_TORCH_CHECK(norm_scope == "layer" || norm_scope == "global",
                    "norm_scope must be 'layer' or 'global', got '", norm_scope, "'");
    STD_TORCH_CHECK(std::isfinite(rho) && rho >= 0, "rho must be finite and at least 0, got ", rho);
    STD_TORCH_CHECK(!rtol || (*rtol >= 1e-7 && *rtol < 1),
                    "rtol must be None or in [1e-7, 1), got ", rtol.value_or(0));
    both = onto == "both";
    onto_B = onto != "A";
    global_norm = norm_scope == "global";
  }

  const void* keep(const Tensor& t, const std::string& name) {
    const bool contiguous = t.is_contiguous();
    check_memory(t, contiguous, name);
    kept.push_back(contiguous ? t : torch::stable::contiguous(t));
    return kept.back().const_data_ptr();
  }

  // The factors that are perturbed: all A, then all B, where it is both. Entry i of them.
  int64_t perturbed_count(int64_t pairs) const { return both ? 2 * pairs : pairs; }
  bool is_A(int64_t i, int64_t pairs) const { return !onto_B || (both && i < pairs); }
  const Tensor& perturbed(int64_t i, const std::vector<Tensor>& A,
                          const std::vector<Tensor>& B) const {
    return (is_A(i, A.size()) ? A : B)[i % A.size()];
  }
  std::string perturbed_name(int64_t i, int64_t pairs) const {
    return argument(is_A(i, pairs) ? "A" : "B", i % pairs);
  }

  // Where its E goes, and its side.
  void*& out_of(int64_t i) { return is_other(i) ? pair_of(i).out_other : pair_of(i).out; }
  Side& side_of(int64_t i) { return is_other(i) ? pair_of(i).other : pair_of(i).target; }
  Pair& pair_of(int64_t i) { return pairs[i % pairs.size()]; }
  bool is_other(int64_t i) const { return both && i < int64_t(pairs.size()); }

  // Checks a pair and appends it, with `out` still to be set. index < 0: no list.
  void add(const Tensor& A, const Tensor& B, const Tensor& grad_A, const Tensor& grad_B,
           double scaling, std::optional<double> rtol, int64_t index) {
    const std::string a = argument("A", index), b = argument("B", index),
                      grad_a = argument("grad_A", index), grad_b = argument("grad_B", index);
    STD_TORCH_CHECK(A.dim() == 2, a, " must be 2-d, (r, m), got shape ", shape_of(A));
    STD_TORCH_CHECK(B.dim() == 2, b, " must be 2-d, (n, r), got shape ", shape_of(B));
    const int64_t r = A.size(0), m = A.size(1), n = B.size(0);
    STD_TORCH_CHECK(B.size(1) == r, b, " must be (n, r) for ", a,
                    " of shape (r, m) = ", shape_of(A), ", got shape ", shape_of(B));
    STD_TORCH_CHECK(r >= 1 && r <= kMaxRank, "the rank of ", a, " must be 1 to ", kMaxRank,
                    ", got ", r);
    STD_TORCH_CHECK(n >= 1 && m >= 1, a, " and ", b, " must not be empty, got shapes ", shape_of(A),
                    " and ", shape_of(B));
    Pair p{};
    p.rank = int(r);
    p.dtype = checked_dtype(A, a);
    check_dtype_and_device(B, b, A, a);
    check_gradient(grad_A, grad_a, A, a);
    check_gradient(grad_B, grad_b, B, b);
    check_scaling(scaling, index);
    p.scaling = scaling;
    const Side side_A{keep(A, a), keep(grad_A, grad_a), m, true},
        side_B{keep(B, b), keep(grad_B, grad_b), n, false};
    p.target = onto_B ? side_B : side_A;
    p.other = onto_B ? side_A : side_B;
    p.rtol = rtol.value_or(default_rtol(p));
    all_float64 = all_float64 && p.dtype == DType::f64;
    pairs.push_back(p);
  }

  // A list of one entry for each perturbed factor.
  void check_perturbed(const char* name, int64_t given, int64_t count) const {
    if (!both) return check_length(name, given, count);
    STD_TORCH_CHECK(given == perturbed_count(count), name,
                    " must have two entries per pair, all A and all B, ", perturbed_count(count),
                    ", got ", given);
  }

  static void check_lengths(const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                            const std::vector<Tensor>& grad_A, const std::vector<Tensor>& grad_B,
                            const std::vector<double>& scaling) {
    check_length("B", B.size(), A.size());
    check_length("grad_A", grad_A.size(), A.size());
    check_length("grad_B", grad_B.size(), A.size());
    check_length("scaling", scaling.size(), A.size());
  }

  // Checks and appends every pair of a list that is not empty; returns a tensor for the norms.
  Tensor add_all(const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                 const std::vector<Tensor>& grad_A, const std::vector<Tensor>& grad_B,
                 const std::vector<double>& scaling, std::optional<double> rtol) {
    check_lengths(A, B, grad_A, grad_B, scaling);
    const int64_t count = A.size();
    kept.reserve(6 * count);
    for (int64_t l = 0; l < count; ++l) {
      check_device(A[l], argument("A", l), A[0], "A[0]");
      add(A[l], B[l], grad_A[l], grad_B[l], scaling[l], rtol, l);
    }
    return new_norms(A[0], {count});
  }

  // As add_all, with what the forward pass has added to the perturbed factors (an empty list:
  // nothing) and the moving averages that the perturbations go into. No pairs: no norms.
  Tensor add_averages(const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                      const std::vector<Tensor>& grad_A, const std::vector<Tensor>& grad_B,
                      const std::vector<Tensor>& E, const std::vector<Tensor>& ema,
                      const Tensor& skipped, const std::vector<double>& scaling, double beta,
                      std::optional<double> rtol) {
    STD_TORCH_CHECK(beta >= 0 && beta <= 1, "beta must be in [0, 1], got ", beta);
    STD_TORCH_CHECK(skipped.defined(), "skipped must be a tensor, got None");
    STD_TORCH_CHECK(type_of(skipped) == ScalarType::Long && skipped.dim() == 0,
                    "skipped must be an int64 tensor without dimensions, got ",
                    dtype_name(type_of(skipped)), " of shape ", shape_of(skipped));
    check_perturbed("ema", ema.size(), A.size());
    if (!E.empty()) check_perturbed("E", E.size(), A.size());
    if (A.empty()) {
      check_lengths(A, B, grad_A, grad_B, scaling);
      return torch::stable::new_empty(skipped, {0}, ScalarType::Float);
    }
    check_memory(skipped, true, "skipped");
    const Tensor norms = add_all(A, B, grad_A, grad_B, scaling, rtol);
    check_device(skipped, "skipped", A[0], "A[0]");
    for (size_t i = 0; i < ema.size(); ++i) {
      check_perturbation(ema[i], argument("ema", i), i, A, B);
      out_of(i) = written(ema[i], argument("ema", i));
      pair_of(i).out_dtype = dtype_of(ema[i]);
    }
    // After the averages: one that is copied on write has its memory now.
    for (size_t i = 0; i < E.size(); ++i) {
      check_perturbation(E[i], argument("E", i), i, A, B);
      side_of(i).added = keep(E[i], argument("E", i));
    }
    return norms;
  }

  // A moving average onto A and the B it is to be applied beside.
  void add_applied(const Tensor& ema, const Tensor& B, double scaling, int64_t index,
                   const Tensor& first) {
    const std::string e = argument("ema", index), b = argument("B", index);
    STD_TORCH_CHECK(ema.dim() == 2 && B.dim() == 2 && ema.size(0) == B.size(1), b,
                    " must be (n, r) for ", e, " of shape (r, m), got shapes ", shape_of(B),
                    " and ", shape_of(ema));
    const int64_t r = ema.size(0);
    STD_TORCH_CHECK(r >= 1 && r <= kMaxRank, "the rank of ", e, " must be 1 to ", kMaxRank,
                    ", got ", r);
    STD_TORCH_CHECK(ema.size(1) >= 1 && B.size(0) >= 1, e, " and ", b,
                    " must not be empty, got shapes ", shape_of(ema), " and ", shape_of(B));
    check_device(ema, e, first, "ema[0]");
    check_device(B, b, first, "ema[0]");
    check_scaling(scaling, index);
    Pair p{};
    p.rank = int(r);
    p.dtype = checked_dtype(B, b);
    p.out_dtype = checked_dtype(ema, e);
    p.scaling = scaling;
    p.target = {keep(B, b), nullptr, B.size(0), false};
    p.other = {keep(ema, e), nullptr, ema.size(1), true};
    all_float64 = all_float64 && p.out_dtype == DType::f64;
    pairs.push_back(p);
  }

  // Float64 when all factors are, else float32.
  Tensor new_norms(const Tensor& like, std::vector<int64_t> shape) const {
    return torch::stable::new_empty(like, shape,
                                    all_float64 ? ScalarType::Double : ScalarType::Float);
  }

  Problem problem(double rho, Update update) const {
    return {pairs.data(), int(pairs.size()),
            rho,          global_norm,
            update,       all_float64 ? DType::f64 : DType::f32};
  }

  static void check_gradient(const Tensor& grad, const std::string& name, const Tensor& factor,
                             const std::string& factor_name) {
    check_like(grad, name, factor, factor_name);
    check_dtype_and_device(grad, name, factor, factor_name);
  }

  // Whether a tensor suits the perturbed factor i: a moving average, or what was added.
  void check_perturbation(const Tensor& t, const std::string& name, int64_t i,
                          const std::vector<Tensor>& A, const std::vector<Tensor>& B) const {
    const Tensor& target = perturbed(i, A, B);
    const std::string like = perturbed_name(i, A.size());
    check_like(t, name, target, like);
    check_device(t, name, target, like);
    const ScalarType expected =
        type_of(target) == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(type_of(t) == expected, name, " must be ", dtype_name(expected), " for ",
                    dtype_name(type_of(target)), " factors, got ", dtype_name(type_of(t)));
  }

  static void check_scaling(double scaling, int64_t index) {
    STD_TORCH_CHECK(std::isfinite(scaling) && scaling != 0, argument("scaling", index),
                    " must be finite and not 0, got ", scaling);
  }
};

}  // namespace eflat
