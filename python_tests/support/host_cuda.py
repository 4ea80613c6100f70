"""The CUDA kernels run on the CPU, as operators: see ``python_tests/cpp/ops_host_cuda.cpp``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from eflat_ext.ops.schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
KEPT: list[torch.library.Library] = []


@cache
def build() -> None:
    """Register ``torch.ops.eflat_float64``, ``eflat_two_float`` and ``eflat_naive``."""
    # Called by the package's operators, which see to autograd.
    for library in ("eflat_float64", "eflat_two_float", "eflat_naive"):
        KEPT.append(torch.library.Library(library, "FRAGMENT"))
        for name, schema in SCHEMAS.items():
            KEPT[-1].define(name + schema)
            KEPT[-1].impl(name, torch.library.fallthrough_kernel, "Autograd")
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


def replace_cpu_kernels(library: str) -> torch.library.Library:
    """Make ``torch.ops.eflat`` on CPU tensors ``torch.ops.<library>`` while the result lives.

    "eflat_plain_torch" is the package's own, without kernels.
    """
    if library != "eflat_plain_torch":
        build()
    replaced = torch.library.Library("eflat", "IMPL")
    for name in SCHEMAS:
        kernel = getattr(getattr(torch.ops, library), name).default
        replaced.impl(name, kernel, "CPU", allow_override=True)
    return replaced
