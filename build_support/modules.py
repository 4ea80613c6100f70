"""The compiled modules, and the command that builds them; needs torch."""

from __future__ import annotations

import subprocess
from glob import glob
from pathlib import Path

from setuptools import Extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

from . import CannotBuild, compiler, cuda, fail
from .commands import remove_modules, write_build_info
from .plan import Plan

# Symbols of the static runtime stay inside, so that it lives beside any other runtime.
STATIC_RUNTIME = [
    "-Wl,--exclude-libs,libcudart_static.a",
    "-lcudart_static",
    "-ldl",
    "-lrt",
    "-lpthread",
]


def extensions(plan: Plan) -> list[Extension]:
    """Return the modules of a plan, the CPU's first."""
    flags = compiler.options(plan.warnings_are_errors)
    modules = [
        CppExtension(
            "eflat_ext._C",
            ["csrc/bindings/ops_cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            py_limited_api=True,
            extra_compile_args=flags,
        )
    ]
    if plan.toolkit is not None:
        module = CppExtension(
            "eflat_ext._C_cuda",
            ["csrc/bindings/ops_cuda.cpp"],
            py_limited_api=True,
            include_dirs=[f"{plan.toolkit.home}/include"],
            library_dirs=[plan.toolkit.libraries()],
            extra_compile_args=[*flags, "-DUSE_CUDA"],
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", *STATIC_RUNTIME],
        )
        module.cuda_sources = sorted(glob("csrc/cuda/*.cu"))
        modules.append(module)
    return modules


class Build(BuildExtension):
    """Build the modules; leave out what fails, unless it is insisted on.

    The .cu files are compiled without torch: they include none of its headers, and a CPU build of
    torch refuses nvcc.
    """

    plan: Plan

    def run(self):
        super().run()
        inplace = self.inplace or self.editable_mode
        folder = Path("eflat_ext") if inplace else Path(self.build_lib, "eflat_ext")
        remove_modules(folder, {Path(self.get_ext_fullpath(e.name)).name for e in self.extensions})
        write_build_info(self.plan, folder)

    def build_extensions(self):
        super().build_extensions()
        planned = {"eflat_ext._C": self.plan.kernels, "eflat_ext._C_cuda": self.plan.toolkit}
        self.extensions = [e for e in self.extensions if planned[e.name]]
        self.distribution.ext_modules = self.extensions

    def build_extension(self, ext):
        if not self.plan.kernels:  # the CPU's module failed
            return
        sources = getattr(ext, "cuda_sources", [])
        try:
            for source in sources:
                ext.extra_objects.append(self.compile_cuda(source))
            super().build_extension(ext)
        except CannotBuild as error:
            self.plan.give_up_cuda(error)
        except Exception as error:  # of ninja, the compiler or the linker, each with its own
            give_up = self.plan.give_up_cuda if sources else self.plan.give_up
            give_up(
                f"{self.plan.compiler} could not build {ext.name} (pip install -v shows what it "
                f"said): {type(error).__name__}: {error}"
            )

    def compile_cuda(self, source: str) -> str:
        """Compile a .cu file, and return the object file's path."""
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        output = str(Path(self.build_temp, Path(source).name + ".o").resolve())
        plan = self.plan
        if plan.toolkit is None:
            fail("the CUDA module is built with a toolkit")
        command = cuda.command(
            plan.toolkit, plan.architectures, source, output, plan.warnings_are_errors
        )
        print(" ".join(command), flush=True)
        try:
            subprocess.check_call(command)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotBuild(
                f"nvcc {plan.toolkit.version} could not compile {source} for {plan.architectures} "
                "(pip install -v shows what it said)"
            ) from error
        return output
