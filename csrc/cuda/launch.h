// The CUDA stages as functions of pointers and a stream; no torch header.
#pragma once
#if defined(EFLAT_HOST_CUDA)
#include EFLAT_HOST_CUDA
#else
#include <cuda_runtime_api.h>
#endif

#include "../core/pairs.h"

namespace eflat::cuda {

// See arithmetic.cuh. Only a host that runs CUDA threads itself has a choice.
enum class Arithmetic { native, float64, two_float };

// Bytes of device memory that a call needs.
int64_t workspace_bytes(const Problem& problem);

// As cpu::perturb. norms: `count` values of problem.norms_dtype; skipped: null, or a counter to add
// to. Everything is enqueued on `stream`, with no allocation and no wait, and may be captured.
cudaError_t perturb(const Problem& problem, void* workspace, void* norms, int64_t* skipped,
                    cudaStream_t stream, Arithmetic arithmetic = Arithmetic::native);

// As cpu::bound; factors: of problem.norms_dtype.
cudaError_t bound(const Problem& problem, void* workspace, void* factors, cudaStream_t stream,
                  Arithmetic arithmetic = Arithmetic::native);

}  // namespace eflat::cuda
