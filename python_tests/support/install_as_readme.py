"""Run README's lines of installation, as they stand, in a new environment, then train a few steps.

They run in a copy of the source, without what was built in it.

    python install_as_readme.py FOLDER [--lowest] [--any-torch]

The versions are the newest, or with --lowest those that pyproject.toml declares. torch is that of
requirements/run.txt, unless --any-torch leaves it to the versions, too: a download of several GB
where the index has it for CUDA.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
BUILT = (".*", "build", "dist", "runs", "*.so", "*.egg-info", "_build_info.py", "__pycache__")
BUILT += ("eflat_ext-*",)  # while a source distribution is packed


def install_lines() -> list[str]:
    """Return the commands of README's first block below "Installation"."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", readme.split("\n## Installation\n")[1], flags=re.S)
    return block[1].splitlines()


def requirements() -> list[str]:
    """Return what pyproject.toml requires: for the build, to run, and for the extra finetune."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    return [*needed, *project["project"]["optional-dependencies"]["finetune"]]


def constraints(lowest: bool, any_torch: bool) -> list[str]:
    """Return the versions to install, in pip's words."""
    wanted = []
    if lowest:
        declared = (re.fullmatch(r"([\w-]+)>=([\d.]+)", r) for r in requirements())
        wanted = [f"{m[1]}=={m[2]}.*" for m in declared if m]
    if not any_torch:
        pinned = (ROOT / "requirements" / "run.txt").read_text(encoding="utf-8")
        wanted = [w for w in wanted if not w.startswith("torch==")]
        wanted += re.findall(r"^torch==.*$", pinned, flags=re.M)
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lowest", action="store_true")
    parser.add_argument("--any-torch", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    python = Path(sys.base_prefix, "bin", "python3")
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    versions = constraints(arguments.lowest, arguments.any_torch)
    Path(folder, "constraints.txt").write_text("".join(f"{v}\n" for v in versions))
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT))
    settings = {
        "PIP_CONSTRAINT": f"{folder}/constraints.txt",
        "PIP_QUIET": "2",
        "PIP_NO_COMPILE": "1",
    }
    settings |= {
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
    }
    environment = {**os.environ, **settings, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    extra = [r for r in requirements() if "=" in r]
    for command in (
        *(["bash", "-euc", line] for line in install_lines()),
        ["pip", "install", *extra],
        ["pip", "check"],
    ):
        start = time.monotonic()
        print("+", *command[2 if command[0] == "bash" else 0 :], flush=True)
        subprocess.run(command, cwd=source, env=environment, check=True)
        print(f"  {time.monotonic() - start:.1f} s", flush=True)
    check = [folder / "bin" / "python", ROOT / "python_tests" / "support" / "check_installed.py"]
    subprocess.run([*check, "--train"], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
