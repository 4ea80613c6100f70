"""Commands of setuptools that need no torch: what is written, and what the wheel is called."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

from .plan import Plan


def write_build_info(plan: Plan, folder: Path) -> None:
    """Write the facts of the build as a Python constant."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f'"""Written by setup.py."""\n\nBUILD_INFO = {plan.build_info()!r}\n'
    Path(folder, "_build_info.py").write_text(text)


def remove_modules(folder: Path, keep: set[str]) -> None:
    """Remove modules of an earlier build, which would be packed or imported."""
    for pattern in ("_C*.so", "_C*.pyd"):
        for file in folder.glob(pattern):
            if file.name not in keep:
                file.unlink()


class BuildPython(build_py):
    """Write the facts of the build; the modules' command does it again when they are built."""

    plan: Plan

    def run(self):
        super().run()
        folder = Path("eflat_ext") if self.editable_mode else Path(self.build_lib, "eflat_ext")
        write_build_info(self.plan, folder)
        if not self.plan.kernels:
            remove_modules(folder, set())


class Wheel(bdist_wheel):
    """Name the wheel by what was built: one without kernels serves every platform."""

    root_is_pure = property(
        lambda self: not self.distribution.has_ext_modules(), lambda self, value: None
    )
