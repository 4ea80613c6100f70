// The three stages on the CPU.
#pragma once
#include <functional>

#include "kernels.h"

namespace eflat::cpu {

// Calls body(0) ... body(count - 1), perhaps from several threads, in any order.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// E, or its moving average, for every pair; norms[l] = ||G_hat|| of pair l. Returns how many pairs
// were left alone (norm zero or not finite, or E too large for its type): their E is zero, their
// moving average untouched. `threads`: how many ParallelFor has; results do not depend on it.
int64_t perturb(const Problem& problem, double* norms, const ParallelFor& parallel_for,
                int threads);

// factors[l] = min(1, rho / (scaling ||B E_A||)), by which E_A (r, m), made with an earlier B, is
// to be multiplied. Pair l gives E_A as other.factor (its type is out_dtype) and B as
// target.factor.
void bound(const Problem& problem, double* factors, const ParallelFor& parallel_for);

}  // namespace eflat::cpu
