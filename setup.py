"""Build eflat_ext, with its kernels where that can be done, otherwise as pure Python.

EFLAT_KERNELS=0|1  (unset: kernels if they can be built) 1: a build of them that fails is an error.
EFLAT_CUDA=auto|0|1  (auto: with a CUDA build of torch) 1: an error where there is no CUDA toolkit;
    with a CPU build of torch the CUDA module is then built all the same, and loads under a CUDA
    torch only.
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  chooses architectures; those before 8.0 are left out.
CXX, CUDA_HOME  choose the compilers; EFLAT_WERROR=1 makes their warnings errors.
"""

import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # reads no license expression in pyproject.toml
    raise SystemExit(
        f"eflat_ext: the build needs setuptools >= 77, found {setuptools.__version__}: "
        "pip install 'setuptools>=77'"
    )

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.commands import BuildPython, Wheel
from build_support.plan import make_plan

plan = make_plan()
BuildPython.plan = plan
commands = {"build_py": BuildPython, "bdist_wheel": Wheel}
modules = []
if plan.kernels:
    from build_support.modules import Build, extensions

    Build.plan = plan
    commands["build_ext"] = Build
    modules = extensions(plan)

setuptools.setup(
    packages=setuptools.find_packages(include=["eflat_ext", "eflat_ext.*"]),
    ext_modules=modules,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
