"""What is built, and why the rest is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import CannotBuild, NothingToBuild, compiler, cuda, fail

TORCH_TARGET = "2.11"  # the oldest torch that the stable ABI is compiled for
INSTALL = "pip install torch ninja 'setuptools>=77' wheel, then pip install --no-build-isolation ."


def choice(environment: Mapping[str, str], name: str, values: tuple[str, ...], default: str) -> str:
    """Return a variable's value, the default where it is unset or empty."""
    value = environment.get(name) or default
    if value.lower() not in values:
        fail(f"{name} must be {', '.join(values[:-1])} or {values[-1]}, got {value!r}")
    return value.lower()


@dataclass
class Plan:
    """The modules that are built; the commands write it down as ``eflat_ext._build_info``.

    Attributes:
        insist: a module that is planned and cannot be built ends the build.
        reason: why there are no kernels; empty where there are.
        cuda_reason: why there are none for CUDA.
    """

    insist: bool = False
    kernels: bool = False
    reason: str = ""
    compiler: str = ""
    torch: str | None = None
    toolkit: cuda.Toolkit | None = None
    architectures: list[str] = field(default_factory=list)
    cuda_reason: str = ""
    warnings_are_errors: bool = False

    def give_up(self, reason: object) -> None:
        """Build no kernels, and say why; end the build where they are insisted on."""
        if self.insist:
            fail(reason)
        self.kernels, self.reason = False, str(reason)
        self.toolkit, self.architectures, self.cuda_reason = None, [], self.reason
        print(f"eflat_ext: built as pure Python, without kernels: {reason}", file=sys.stderr)

    def give_up_cuda(self, reason: object) -> None:
        """Build no CUDA kernels, and say why; end the build where they are insisted on."""
        if self.insist:
            fail(reason)
        self.without_cuda(reason)

    def without_cuda(self, reason: object) -> None:
        """Build no CUDA kernels, and say why."""
        self.toolkit, self.architectures, self.cuda_reason = None, [], str(reason)
        print(f"eflat_ext: built without CUDA kernels: {reason}", file=sys.stderr)

    def build_info(self) -> dict[str, object]:
        """Return what ``eflat_ext.build_info()`` returns."""
        return {
            "kernels": self.kernels,
            "reason": self.reason,
            "cuda": self.toolkit is not None,
            "cuda_reason": self.cuda_reason,
            "cuda_architectures": self.architectures,
            "compiler": self.compiler,
            "torch_target": TORCH_TARGET,
            "torch_built_with": self.torch,
            "cuda_built_with": None if self.toolkit is None else self.toolkit.version,
        }


def make_plan(environment: Mapping[str, str] = os.environ) -> Plan:
    """Decide what is built, from the environment, the installed torch and the compilers."""
    kernels = choice(environment, "EFLAT_KERNELS", ("0", "1", "unset"), "unset")
    with_cuda = choice(environment, "EFLAT_CUDA", ("auto", "0", "1"), "auto")
    warnings = choice(environment, "EFLAT_WERROR", ("0", "1"), "0")
    if kernels == "0" and with_cuda == "1":
        fail("EFLAT_CUDA=1 asks for kernels, EFLAT_KERNELS=0 for none: unset one of them")
    plan = Plan(insist="1" in (kernels, with_cuda), warnings_are_errors=warnings == "1")
    if kernels == "0":
        plan.reason = plan.cuda_reason = "it was installed with EFLAT_KERNELS=0"
        return plan
    try:
        torch = import_torch()
        plan.compiler = compiler.find()
    except CannotBuild as error:
        plan.give_up(error)
        return plan
    plan.kernels, plan.torch = True, torch.__version__
    if with_cuda == "0":
        plan.cuda_reason = "it was installed with EFLAT_CUDA=0"
    elif with_cuda == "auto" and torch.version.cuda is None:
        plan.cuda_reason = f"it was built with torch {torch.__version__}, which has no CUDA"
    else:
        try:
            plan.toolkit = cuda.find_toolkit(torch)
            plan.architectures = cuda.architectures(torch, plan.toolkit)
        except CannotBuild as error:
            if with_cuda == "auto" and isinstance(error, NothingToBuild):
                plan.without_cuda(error)
            else:
                plan.give_up_cuda(error)
    return plan


def import_torch():
    """Return the installed torch, which the modules are compiled against.

    Raises:
        CannotBuild: there is none, or it is too old.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        raise CannotBuild(
            "kernels are built against the installed torch, which "
            f"{'was not found' if missing else f'does not load ({error})'}: {INSTALL}"
        ) from error
    release = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    if release < tuple(int(x) for x in TORCH_TARGET.split(".")):
        raise CannotBuild(f"kernels need torch >= {TORCH_TARGET}, found {torch.__version__}")
    return torch
