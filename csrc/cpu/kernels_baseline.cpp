// For every processor of the architecture: SSE2, NEON.
#define EFLAT_TARGET baseline
#define EFLAT_LANES 2
#define EFLAT_VECTORS 2
#include <utility>

#include "adamw.inl"
#include "kernels.h"
#include "kernels.inl"

namespace eflat::cpu {
const Kernels kBaseline = table("baseline");
}
