"""Build the CPU module always, the CUDA module where there is a CUDA torch and nvcc.

EFLAT_CUDA=auto|0|1 (auto): 1 insists on CUDA; with a CPU build of torch the CUDA module is then
compiled and linked all the same, to check that it builds; it loads under a CUDA torch only.
TORCH_CUDA_ARCH_LIST chooses architectures ("8.0;9.0+PTX"); those before 8.0 are left out.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path


def fail(message):
    raise SystemExit(f"eflat_ext: {message}")


try:
    import torch
except ImportError:
    fail(
        "it is built against the installed torch, which was not found: "
        "pip install torch ninja setuptools wheel, then pip install --no-build-isolation ."
    )


def is_toolkit(folder):
    files = ("include/cuda_runtime.h", "bin/nvcc")
    return all(Path(folder, file).is_file() for file in files)


def find_cuda_home():
    """Return the toolkit's folder, also if the nvcc on the path is a wrapper script, or None."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if given:
        if not is_toolkit(given):
            fail(f"CUDA_HOME is {given}, which has no bin/nvcc and include/cuda_runtime.h")
        return given
    candidates = []
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
        dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        output = subprocess.run(dry_run, capture_output=True, text=True, check=False).stderr
        here = re.search(r"_HERE_=(\S+)", output)
        candidates += [Path(here.group(1)).parent] if here else []
    return next((str(c) for c in [*candidates, "/usr/local/cuda"] if is_toolkit(c)), None)


MODE = os.environ.get("EFLAT_CUDA", "auto").lower()
if MODE not in ("auto", "0", "1"):
    fail(f"EFLAT_CUDA must be auto, 0 or 1, got {MODE!r}")
CUDA_TORCH = torch.version.cuda is not None
CUDA_HOME = find_cuda_home() if MODE == "1" or (MODE == "auto" and CUDA_TORCH) else None
if MODE == "1" and CUDA_HOME is None:
    fail("EFLAT_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME to a folder with bin/nvcc")
if torch.version.hip is not None and MODE == "1":
    fail("EFLAT_CUDA=1, but the installed torch is a ROCm build")
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # before torch's extension module is imported
WITH_CUDA = CUDA_HOME is not None

TORCH_TARGET = "2.11"  # the oldest torch that the stable ABI is compiled for
if tuple(int(x) for x in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
    fail(f"torch >= {TORCH_TARGET} is needed, found {torch.__version__}")
if WITH_CUDA and CUDA_TORCH:
    version = subprocess.run(
        [f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    toolkit = re.search(r"release (\d+)\.", version)
    if toolkit and toolkit.group(1) != torch.version.cuda.split(".")[0]:
        fail(
            f"nvcc is of CUDA {toolkit.group(1)}, torch of CUDA {torch.version.cuda}: install the "
            "matching toolkit, set CUDA_HOME to it, or build for the CPU alone with EFLAT_CUDA=0"
        )

from setuptools import find_packages, setup  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension  # noqa: E402


def wanted_architectures():
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
    command = [f"{CUDA_HOME}/bin/nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    names = [name for name in names if f"compute_{name.replace('.', '')}" in known]
    return [*names[:-1], *(f"{name}+PTX" for name in names[-1:])]  # and for later ones


def architectures():
    """Return the wanted architectures that have the float64 tensor cores of the kernels."""
    wanted = wanted_architectures()
    able = [name for name in wanted if float(re.match(r"[\d.]+", name)[0]) >= 8]
    if able != wanted or not able:
        got = ", ".join(name for name in wanted if name not in able) or "an nvcc without it"
        message = f"the CUDA kernels need compute capability 8.0 or higher, got {got}"
        if MODE == "1" and not able:
            fail(message)
        print(f"eflat_ext: {message}", file=sys.stderr)
    return able


def runtime_folder():
    """Return the toolkit's folder of libcudart."""
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if glob(f"{CUDA_HOME}/{folder}/libcudart.so*"):
            return f"{CUDA_HOME}/{folder}"
    return fail(f"no libcudart.so in lib64, lib or targets/*/lib of {CUDA_HOME}")


ARCHITECTURES = architectures() if WITH_CUDA else []
WITH_CUDA = bool(ARCHITECTURES)


class Build(BuildExtension):
    """Compile the .cu files of an extension without torch: they include none of its headers, and a
    CPU build of torch refuses nvcc."""

    def build_extension(self, ext):
        for source in getattr(ext, "cuda_sources", []):
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            output = str(Path(self.build_temp, Path(source).name + ".o").resolve())
            code = []
            for arch in ARCHITECTURES:
                number = arch.replace("+PTX", "").replace(".", "")
                code += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
                if arch.endswith("+PTX"):
                    code += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
            command = [f"{CUDA_HOME}/bin/nvcc", "-std=c++20", "-O3", "-lineinfo", "--threads", "2"]
            command += ["-Werror", "all-warnings", *code]
            command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-c", source, "-o", output]
            print(" ".join(command))
            try:
                subprocess.check_call(command)
            except subprocess.CalledProcessError:
                fail(f"nvcc could not compile {source} for {ARCHITECTURES}: see its message above")
            ext.extra_objects.append(output)
        super().build_extension(ext)


class BuildPython(build_py):
    """Write the facts of the build as a Python constant."""

    def run(self):
        super().run()
        compiler = subprocess.run(
            [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=False
        ).stdout.split("\n")[0]
        info = {
            "cuda": WITH_CUDA,
            "cuda_architectures": ARCHITECTURES,
            "compiler": compiler,
            "torch_target": TORCH_TARGET,
            "torch_built_with": torch.__version__,
            "cuda_built_with": torch.version.cuda if WITH_CUDA else None,
        }
        text = f'"""Written by setup.py."""\n\nBUILD_INFO = {info!r}\n'
        folder = Path("eflat_ext") if self.editable_mode else Path(self.build_lib, "eflat_ext")
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, "_build_info.py").write_text(text)


CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",  # square roots are vectors then
    "-Wall",
    "-Wno-psabi",
    f"-ffile-prefix-map={Path.cwd()}/=",  # error messages name files of the project
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # TORCH_TARGET
]

extensions = [
    CppExtension(
        "eflat_ext._C",
        ["csrc/bindings/ops_cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        py_limited_api=True,
        extra_compile_args=CXX_FLAGS,
    )
]
if WITH_CUDA:
    cuda = CppExtension(
        "eflat_ext._C_cuda",
        ["csrc/bindings/ops_cuda.cpp"],
        py_limited_api=True,
        include_dirs=[f"{CUDA_HOME}/include"],
        library_dirs=[runtime_folder()],
        extra_compile_args=[*CXX_FLAGS, "-DUSE_CUDA"],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-lcudart"],
    )
    cuda.cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    extensions.append(cuda)

setup(
    packages=find_packages(include=["eflat_ext", "eflat_ext.*"]),
    ext_modules=extensions,
    cmdclass={"build_ext": Build, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
