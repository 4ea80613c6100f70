"""The CUDA toolkit, the architectures, and the command that compiles the kernels."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import CannotBuild, NothingToBuild, compiler, fail

# Parameters of kernels above 4 KB; C++20 came with 12.0.
OLDEST_NVCC = (12, 1)
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
)
PLACES = ("/usr/local/cuda",)
LIBRARIES = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")


def install(version: str) -> str:
    """Return the command that installs a toolkit from the package index."""
    return f"pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={version}.*'"


@dataclass(frozen=True)
class Toolkit:
    """A folder with nvcc, its headers and the static runtime."""

    home: Path
    version: str
    from_packages: bool = False

    @property
    def nvcc(self) -> str:
        return str(self.home / "bin" / "nvcc")

    def libraries(self) -> str:
        """Return the folder of the static runtime."""
        folders = (self.home / name for name in LIBRARIES)
        found = [folder for folder in folders if (folder / "libcudart_static.a").is_file()]
        if not found:
            raise CannotBuild(
                f"there is no libcudart_static.a in {', '.join(LIBRARIES)} of {self.home}"
            )
        return str(found[0])


def is_toolkit(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("include/cuda_runtime.h", "bin/nvcc"))


def candidates() -> Iterator[tuple[Path, bool]]:
    """Yield folders of toolkits, and whether they are of packages in Python's environment.

    Those come before PATH: they were installed for this environment's torch, while the machine has
    one nvcc for all.
    """
    for entry in sys.path:
        for folder in sorted(Path(entry or ".").glob("nvidia/cu[0-9]*"), reverse=True):
            yield folder.resolve(), True
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parent.parent, False
        # A wrapper script lies elsewhere.
        dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        output = subprocess.run(dry_run, capture_output=True, text=True, check=False).stderr
        here = re.search(r"_HERE_=(\S+)", output)
        if here:
            yield Path(here.group(1)).parent, False
    yield from ((Path(place), False) for place in PLACES)


def find_toolkit(torch) -> Toolkit:
    """Return the first toolkit that can compile the kernels for a torch.

    ``CUDA_HOME`` (``CUDA_PATH``) leaves no choice; then come the packages in Python's environment,
    the nvcc on PATH, and ``/usr/local/cuda``.

    Raises:
        NothingToBuild: there is none.
        CannotBuild: there is none that fits; the message is about the first of them.
    """
    if torch.version.hip is not None:
        raise NothingToBuild("the installed torch is a ROCm build, which CUDA kernels do not serve")
    if sys.platform != "linux":
        raise NothingToBuild("CUDA kernels are built on Linux alone")
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if given and not is_toolkit(Path(given)):
        raise CannotBuild(f"CUDA_HOME is {given}, which has no bin/nvcc and include/cuda_runtime.h")
    reasons = []
    for home, from_packages in [(Path(given), False)] if given else candidates():
        if is_toolkit(home):
            try:
                toolkit = Toolkit(home, nvcc_version(home), from_packages)
                check(toolkit, torch)
            except CannotBuild as error:
                reasons.append(error)
            else:
                os.environ["CUDA_HOME"] = str(home)  # torch's extension module reads it
                return toolkit
    if reasons:
        raise reasons[0]
    command = install(torch.version.cuda or "13.0")
    raise NothingToBuild(f"no CUDA toolkit was found: {command}, or set CUDA_HOME to one")


def nvcc_version(home: Path) -> str:
    command = [str(home / "bin" / "nvcc"), "--version"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from error
    release = re.search(r"release (\d+\.\d+)", output)
    if not release:
        raise CannotBuild(f"{command[0]} --version tells no version")
    return release.group(1)


def check(toolkit: Toolkit, torch) -> None:
    """Raise CannotBuild if a toolkit is too old, mixed, incomplete, or of a CUDA not torch's."""
    if tuple(int(x) for x in toolkit.version.split(".")) < OLDEST_NVCC:
        raise CannotBuild(
            f"the CUDA kernels need nvcc 12.1 or newer (C++20, and kernel parameters above 4 KB), "
            f"{toolkit.nvcc} is {toolkit.version}"
        )
    wanted = torch.version.cuda
    if wanted and wanted.split(".")[0] != toolkit.version.split(".")[0]:
        raise CannotBuild(
            f"nvcc is of CUDA {toolkit.version}, torch of CUDA {wanted}: {install(wanted)}, set "
            "CUDA_HOME to a matching toolkit, or build for the CPU alone with EFLAT_CUDA=0"
        )
    if toolkit.from_packages:
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "missing"
        if len({version.rsplit(".", 1)[0] for version in versions.values()}) > 1:
            found = ", ".join(f"{name} {version}" for name, version in versions.items())
            raise CannotBuild(
                f"the toolkit's packages must be of one minor version, got {found}: "
                f"{install(wanted or toolkit.version)}"
            )
    toolkit.libraries()


def wanted_architectures(torch, toolkit: Toolkit) -> list[str]:
    """Return architectures in torch's spelling: the given ones, visible GPUs', or all of nvcc."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        names = re.split("[; ]+", given.strip("; "))
        for name in names:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                fail(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got {given!r}")
        return names
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        capabilities = {torch.cuda.get_device_capability(i) for i in devices}
        return [f"{major}.{minor}" for major, minor in sorted(capabilities)]
    command = [toolkit.nvcc, "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
    return [*names[:-1], *(f"{name}+PTX" for name in names[-1:])]  # and for later ones


def architectures(torch, toolkit: Toolkit) -> list[str]:
    """Return the wanted architectures that have the float64 tensor cores of the kernels.

    Raises:
        NothingToBuild: there are none.
    """
    wanted = wanted_architectures(torch, toolkit)
    able = [name for name in wanted if float(re.match(r"[\d.]+", name)[0]) >= 8]
    if able != wanted or not able:
        got = ", ".join(name for name in wanted if name not in able) or "an nvcc without it"
        message = f"the CUDA kernels need compute capability 8.0 or higher, got {got}"
        if not able:
            raise NothingToBuild(message)
        print(f"eflat_ext: {message}", file=sys.stderr)
    return able


def command(
    toolkit: Toolkit, names: list[str], source: str, output: str, strict: bool
) -> list[str]:
    """Return the command that compiles one source for architectures in torch's spelling."""
    code = []
    for name in names:
        number = name.replace("+PTX", "").replace(".", "")
        code += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if name.endswith("+PTX"):
            code += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    options = ["-std=c++20", "-O3", "-lineinfo", "--threads", "2", *compiler.nvcc_options()]
    options += ["-Werror", "all-warnings"] if strict else []
    options += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return [toolkit.nvcc, *options, *code, "-c", source, "-o", output]
