"""The CUDA kernels run on the CPU, as operators: see ``python_tests/cpp/ops_host_cuda.cpp``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
OPERATORS = (
    "perturb",
    "foreach_perturb",
    "foreach_perturb_ema_",
    "foreach_adamw_step_",
    "foreach_bound",
)

KEPT: list[torch.library.Library] = []


@cache
def build() -> None:
    """Register ``torch.ops.eflat_float64``, ``eflat_two_float`` and ``eflat_naive``."""
    folder = ROOT / "build" / "host_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".being_built"):  # tests run in several processes
        cpp_extension.load(
            "eflat_host_cuda",
            [
                str(ROOT / "python_tests" / "cpp" / name)
                for name in ("ops_host_cuda.cpp", "host_cuda.cpp")
            ],
            extra_cflags=[
                "-O2",
                "-std=c++20",
                "-fopenmp-simd",
                "-Wno-psabi",
                "-DTORCH_TARGET_VERSION=0x020b000000000000",
            ],
            build_directory=str(folder),
            is_python_module=False,
        )
    # Called by the package's operators, which see to autograd.
    for library in ("eflat_float64", "eflat_two_float", "eflat_naive"):
        KEPT.append(torch.library.Library(library, "FRAGMENT"))
        for name in OPERATORS:
            KEPT[-1].impl(name, torch.library.fallthrough_kernel, "Autograd")


def replace_cpu_kernels(library: str) -> torch.library.Library:
    """Make ``torch.ops.eflat`` on CPU tensors ``torch.ops.<library>`` while the result lives."""
    build()
    import eflat_ext  # noqa: F401  (registers what is replaced)

    replaced = torch.library.Library("eflat", "IMPL")
    for name in OPERATORS:
        kernel = getattr(getattr(torch.ops, library), name).default
        replaced.impl(name, kernel, "CPU", allow_override=True)
    return replaced
