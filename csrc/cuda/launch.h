// The CUDA stages as functions of pointers and a stream; no torch header.
#pragma once
#if defined(EFLAT_HOST_CUDA)
#include EFLAT_HOST_CUDA
#else
#include <cuda_runtime_api.h>
#endif

#include "../pairs.h"

namespace eflat::cuda {

// Bytes of device memory that a call needs.
int64_t workspace_bytes(const Problem& problem);

// As cpu::perturb. norms: `count` values of problem.norms_dtype; skipped: null, or a counter to add
// to. Everything is enqueued on `stream`, which must not be capturing: small tables are copied from
// the host.
cudaError_t perturb(const Problem& problem, void* workspace, void* norms, int64_t* skipped,
                    cudaStream_t stream);

// As cpu::bound.
cudaError_t bound(const Problem& problem, void* workspace, void* factors, DType factors_dtype,
                  cudaStream_t stream);

}  // namespace eflat::cuda
