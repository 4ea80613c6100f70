"""The C++ compiler and its options. Those of MSVC and AppleClang have never been tried; the kernels
use vectors of GCC and Clang that MSVC does not have."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from . import CannotBuild

NAMES = ("c++", "g++", "clang++")
WRAPPERS = ("ccache", "sccache", "distcc")
PROBE = """#include <Python.h>
#include <concepts>
#if __cplusplus < 202002L
#error the language is older than C++20
#endif
template <std::integral T> T same(T x) { return x; }
typedef double Vector __attribute__((vector_size(16)));
Vector swapped(Vector v) { return __builtin_shufflevector(v, v, 1, 0); }
"""


def find() -> str:
    """Return the compiler's name and version, and name it in ``$CXX`` for setuptools and torch.

    Raises:
        CannotBuild: there is none, or it does not compile C++20, GCC's vectors, Python's headers.
    """
    if sys.platform == "win32":
        return "MSVC"  # found by setuptools
    given = os.environ.get("CXX")
    name = shlex.split(given)[0] if given else next(filter(shutil.which, NAMES), None)
    if name is None:
        raise CannotBuild(f"no C++ compiler was found on PATH ({', '.join(NAMES)})")
    if shutil.which(name) is None:
        raise CannotBuild(f"CXX is {given!r}, which was not found")
    os.environ["CXX"] = given or name
    command = shlex.split(os.environ["CXX"])
    output = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    version = output.stdout.strip().split("\n")[0] or command[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        include = f"-I{sysconfig.get_paths()['include']}"
        command += ["-std=c++20", include, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return version
    if "Python.h" in result.stderr:
        raise CannotBuild("Python's headers were not found (Python.h): install python3-dev")
    lines = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    said = lines[0].strip() if lines else f"exit status {result.returncode}"
    raise CannotBuild(
        f"{version} does not compile the kernels' C++20 (GCC 12 and Clang 14 do): {said}"
    )


def nvcc_options() -> list[str]:
    """Return the options that make nvcc compile the host's code with ``$CXX``."""
    words = shlex.split(os.environ.get("CXX", ""))
    while words and Path(words[0]).name in WRAPPERS:
        words.pop(0)
    if not words or words[0] in ("c++", "g++"):  # nvcc's own choice
        return []
    return ["-ccbin", words[0], *(x for word in words[1:] for x in ("-Xcompiler", word))]


def options(warnings_are_errors: bool) -> list[str]:
    """Return the options of the modules' C++ sources."""
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # plan.TORCH_TARGET
    if sys.platform == "win32":
        flags = ["/O2", "/std:c++20", "/EHsc", "/permissive-", "/Zc:__cplusplus", "/W3", target]
        return [*flags, "/openmp:experimental", *(["/WX"] if warnings_are_errors else [])]
    # AppleClang takes OpenMP's pragmas from its inner compiler alone.
    openmp = ["-Xclang"] if sys.platform == "darwin" else []
    return [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fvisibility=hidden",
        *openmp,
        "-fopenmp-simd",
        "-fno-math-errno",  # square roots are vectors then
        "-Wall",
        "-Wno-psabi",
        *(["-Werror"] if warnings_are_errors else []),
        f"-ffile-prefix-map={Path.cwd()}/=",  # error messages name files of the project
        target,
    ]
