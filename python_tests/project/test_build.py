"""The build takes what it can, says why it leaves something out, and refuses wrong settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from install_as_readme import BUILT

import eflat_ext
from build_support import CannotBuild, compiler, cuda
from build_support.plan import Plan, make_plan

ROOT = Path(__file__).parents[2]
SETTINGS = ("EFLAT_KERNELS", "EFLAT_CUDA", "EFLAT_WERROR", "TORCH_CUDA_ARCH_LIST")


@pytest.fixture(autouse=True)
def settings_of_their_own():
    """The build writes into the environment, for torch."""
    kept = dict(os.environ)
    for name in (*SETTINGS, "CXX", "CUDA_HOME", "CUDA_PATH"):
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    yield
    os.environ.clear()
    os.environ.update(kept)


def setup(
    *arguments: str, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def script(file: Path, text: str) -> str:
    """Write a shell script, and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"EFLAT_KERNELS": "yes"}, "EFLAT_KERNELS must be 0, 1 or unset, got 'yes'"),
        ({"EFLAT_CUDA": "yes"}, "EFLAT_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"EFLAT_WERROR": "on"}, "EFLAT_WERROR must be 0 or 1, got 'on'"),
        (
            {"EFLAT_KERNELS": "0", "EFLAT_CUDA": "1"},
            "EFLAT_CUDA=1 asks for kernels, EFLAT_KERNELS=0 for none: unset one of them",
        ),
        (
            {"EFLAT_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "CUDA_HOME is /nonexistent, which has no bin/nvcc and include/cuda_runtime.h",
        ),
    ],
)
def test_wrong_settings_are_named(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^eflat_ext: {re.escape(message)}$"):
        make_plan()


def test_a_refusal_is_one_line():
    result = setup("--version", EFLAT_KERNELS="yes")
    assert result.returncode == 1
    assert result.stderr == "eflat_ext: EFLAT_KERNELS must be 0, 1 or unset, got 'yes'\n"


def test_an_old_setuptools_is_named(tmp_path):
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    result = setup("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    words = (
        "eflat_ext: the build needs setuptools >= 77, found 65.5.0: pip install 'setuptools>=77'"
    )
    assert result.stderr == f"{words}\n"


def test_pure_python_is_built_without_torch_and_compilers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EFLAT_KERNELS", "0")
    info = make_plan().build_info()
    assert info["reason"] == info["cuda_reason"] == "it was installed with EFLAT_KERNELS=0"
    assert not info["kernels"] and not info["cuda"]


def no_torch(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "torch", None)


def old_torch(monkeypatch, folder):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu130")


def no_compiler(monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))


def no_such_compiler(monkeypatch, folder):
    monkeypatch.setenv("CXX", "c++-of-nobody -m64")


def old_compiler(monkeypatch, folder):
    said = 'test $1 = --version && exec echo "c++ 8.3.0"\necho "error: no -std=c++20" >&2; exit 1'
    monkeypatch.setenv("CXX", script(folder / "old", said))


def no_headers(monkeypatch, folder):
    said = "echo 'fatal error: Python.h: No such file or directory' >&2; exit 1"
    monkeypatch.setenv("CXX", script(folder / "bare", said))


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (
            no_torch,
            "kernels are built against the installed torch, which was not found: pip install",
        ),
        (old_torch, "kernels need torch >= 2.11, found 2.10.1+cu130"),
        (no_compiler, "no C++ compiler was found on PATH (c++, g++, clang++)"),
        (no_such_compiler, "CXX is 'c++-of-nobody -m64', which was not found"),
        (
            old_compiler,
            "c++ 8.3.0 does not compile the kernels' C++20 (GCC 12 and Clang 14 do): error",
        ),
        (no_headers, "Python's headers were not found (Python.h): install python3-dev"),
    ],
)
def test_without_the_means_it_is_pure_python_or_an_error(
    break_it: Callable[..., None], reason, tmp_path, monkeypatch, capsys
):
    break_it(monkeypatch, tmp_path)
    info = make_plan().build_info()
    assert info["kernels"] is False and info["reason"].startswith(reason)
    assert info["cuda"] is False and info["cuda_reason"] == info["reason"]
    warned = capsys.readouterr().err
    assert warned == f"eflat_ext: built as pure Python, without kernels: {info['reason']}\n"
    monkeypatch.setenv("EFLAT_KERNELS", "1")
    with pytest.raises(SystemExit, match=f"^eflat_ext: {re.escape(reason)}"):
        make_plan()


def test_a_compiler_that_fails_gives_pure_python_or_an_error(tmp_path):
    """It compiles the probe, and none of the sources; a module of an earlier build is left out."""
    fails = 'case "$*" in *csrc*) echo "no space left" >&2; exit 1;; esac\nexec c++ "$@"'
    environment = {"CXX": script(tmp_path / "fails", fails), "EFLAT_CUDA": "0", "MAX_JOBS": "1"}
    build = ["build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    stale = tmp_path / "lib" / "eflat_ext" / "_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    wheel = ["bdist_wheel", "--bdist-dir", str(tmp_path / "bdist"), "--dist-dir", str(tmp_path)]
    result = setup(
        "--quiet", "egg_info", "--egg-base", str(tmp_path), *build, *wheel, **environment
    )
    assert result.returncode == 0, result.stderr
    assert "built as pure Python, without kernels" in result.stderr
    assert not stale.exists()
    with zipfile.ZipFile(tmp_path / "eflat_ext-0.1.0-py3-none-any.whl") as packed:
        names = packed.namelist()
        info = packed.read("eflat_ext/_build_info.py").decode()
    assert "eflat_ext/ops/__init__.py" in names
    assert not [n for n in names if n.endswith(".so") or n.startswith("build_support")]
    assert "'kernels': False" in info and "could not build eflat_ext._C" in info
    result = setup("--quiet", *build, **environment, EFLAT_KERNELS="1")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.match(r"eflat_ext: .*could not build eflat_ext\._C \(pip install -v shows", last)


def test_the_source_distribution_is_whole(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT))
    sdist = ["sdist", "--dist-dir", str(tmp_path)]
    result = setup("--quiet", *sdist, folder=source, EFLAT_KERNELS="0")
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / "eflat_ext-0.1.0.tar.gz") as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    needed = [f for room in ("csrc", "build_support") for f in (ROOT / room).rglob("*.*")]
    needed = {str(f.relative_to(ROOT)) for f in needed if f.suffix != ".pyc"}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", *needed} <= names
    assert not [n for n in names if n.endswith((".so", "_build_info.py"))]


def toolkit(folder: Path, *architectures: str, version: str = "13.0") -> str:
    """Create the files of a CUDA toolkit that the build looks at before it compiles."""
    for name in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    names = "".join(f"compute_{name}\\n" for name in architectures)
    says = f"test $1 = --version && exec echo 'release {version}, V{version}.88'"
    script(folder / "bin" / "nvcc", f"{says}\nprintf '{names}'")
    return str(folder)


@pytest.fixture
def cuda_torch(monkeypatch) -> None:
    """Let the installed torch be one of CUDA 13.0, in an environment without a toolkit."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "PLACES", ())
    monkeypatch.setenv("CXX", "true")  # as a compiler that takes everything
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "nvidia").is_dir()])
    keep = [p for p in os.environ["PATH"].split(":") if not Path(p, "nvcc").exists()]
    monkeypatch.setenv("PATH", ":".join(keep))


@pytest.mark.parametrize(
    "given, built",
    [
        ("", ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1+PTX"]),
        ("7.5 8.0; 9.0a+PTX", ["8.0", "9.0a+PTX"]),
        ("7.0;7.5", []),
    ],
)
def test_the_build_records_the_architectures(
    given, built, tmp_path, cuda_torch, monkeypatch, capsys
):
    known = ("75", "80", "86", "87", "88", "89", "90", "100", "110", "103", "120", "121")
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path / "toolkit", *known))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    info = make_plan().build_info()
    assert (info["cuda"], info["cuda_architectures"]) == (bool(built), built)
    assert info["kernels"] and info["cuda_built_with"] == ("13.0" if built else None)
    assert ("need compute capability 8.0" in capsys.readouterr().err) == ("7." in given)
    assert bool(info["cuda_reason"]) != info["cuda"]


def test_unsupported_architectures_are_named(tmp_path, cuda_torch, monkeypatch):
    monkeypatch.setenv("EFLAT_CUDA", "1")
    new, old = toolkit(tmp_path / "new", "80"), toolkit(tmp_path / "old", "70", "75")
    for home, given, words in (
        (new, "7.0;7.5", "need compute capability 8.0 or higher, got 7.0, 7.5"),
        (old, "", "need compute capability 8.0 or higher, got an nvcc without it"),
        (new, "Ampere", "TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got 'Ampere'"),
    ):
        monkeypatch.setenv("CUDA_HOME", home)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        with pytest.raises(SystemExit, match=re.escape(words)):
            make_plan()


def no_toolkit(monkeypatch, folder):
    pass


def old_nvcc(monkeypatch, folder):
    monkeypatch.setenv("CUDA_HOME", toolkit(folder, "80", version="12.0"))


def other_cuda(monkeypatch, folder):
    monkeypatch.setenv("CUDA_HOME", toolkit(folder, "80", version="12.8"))


def no_static_runtime(monkeypatch, folder):
    monkeypatch.setenv("CUDA_HOME", toolkit(folder, "80"))
    (folder / "lib64" / "libcudart_static.a").unlink()


def silent_nvcc(monkeypatch, folder):
    monkeypatch.setenv("CUDA_HOME", toolkit(folder))
    script(folder / "bin" / "nvcc", "exit 1")


def packages(folder: Path, *architectures: str, **versions: str) -> str:
    """Install what the build looks at of NVIDIA's packages, and return the toolkit's folder."""
    home = folder / "nvidia" / "cu13"
    toolkit(home, *architectures, version="13.0")
    for name, version in versions.items():
        distribution = f"nvidia_{name}-{version}.dist-info"
        (folder / distribution).mkdir()
        text = f"Metadata-Version: 2.1\nName: nvidia-{name.replace('_', '-')}\nVersion: {version}\n"
        (folder / distribution / "METADATA").write_text(text)
    return str(home)


WHOLE = {"cuda_nvcc": "13.0.88", "cuda_crt": "13.0.88", "nvvm": "13.0.88"}
WHOLE |= {"cuda_runtime": "13.0.96", "cuda_cccl": "13.0.85"}


def mixed_packages(monkeypatch, folder):
    packages(folder, "80", **{**WHOLE, "nvvm": "13.1.115"})
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])


def missing_packages(monkeypatch, folder):
    packages(folder, "80", **{k: v for k, v in WHOLE.items() if k != "cuda_cccl"})
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])


INSTALL = "pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.*'"


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (no_toolkit, f"no CUDA toolkit was found: {INSTALL}, or set CUDA_HOME to one"),
        (
            old_nvcc,
            "the CUDA kernels need nvcc 12.1 or newer (C++20, and kernel parameters above 4 KB)",
        ),
        (
            other_cuda,
            f"nvcc is of CUDA 12.8, torch of CUDA 13.0: {INSTALL}, set CUDA_HOME to a match",
        ),
        (no_static_runtime, "there is no libcudart_static.a in lib64, lib, targets/"),
        (silent_nvcc, "{folder}/bin/nvcc --version tells no version"),
        (
            mixed_packages,
            "the toolkit's packages must be of one minor version, got nvidia-cuda-nvcc",
        ),
        (
            missing_packages,
            "the toolkit's packages must be of one minor version, got nvidia-cuda-nvcc",
        ),
    ],
)
def test_without_a_toolkit_that_fits_there_are_no_cuda_kernels_or_it_is_an_error(
    break_it: Callable[..., None], reason, tmp_path, cuda_torch, monkeypatch
):
    break_it(monkeypatch, tmp_path)
    reason = reason.replace("{folder}", str(tmp_path))
    info = make_plan().build_info()
    assert info["kernels"] and not info["cuda"] and info["cuda_reason"].startswith(reason)
    assert ("missing" in info["cuda_reason"]) == (break_it is missing_packages)
    monkeypatch.setenv("EFLAT_KERNELS", "1")
    if break_it is no_toolkit:  # no failure, unless CUDA is asked for
        assert not make_plan().build_info()["cuda"]
        monkeypatch.setenv("EFLAT_CUDA", "1")
    with pytest.raises(SystemExit, match=f"^eflat_ext: {re.escape(reason)}"):
        make_plan()


def test_the_environments_toolkit_comes_before_that_of_path(tmp_path, cuda_torch, monkeypatch):
    """And after CUDA_HOME; one that does not fit is passed over."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    path = Path(toolkit(tmp_path / "toolkit", "80"))
    monkeypatch.setenv("PATH", f"{path}/bin", prepend=":")
    environment = tmp_path / "site-packages"
    home = Path(packages(environment, "80", **WHOLE))
    monkeypatch.setattr(sys, "path", [str(environment), *sys.path])

    def found() -> Path:
        monkeypatch.delenv("CUDA_HOME", raising=False)
        return make_plan().toolkit.home

    assert found() == home
    assert os.environ["CUDA_HOME"] == str(home)  # for torch
    toolkit(home, "80", version="12.8")
    assert found() == path
    monkeypatch.setenv("CUDA_HOME", str(path))
    toolkit(home, "80")
    assert make_plan().toolkit.home == path
    # nvcc on PATH may be a script elsewhere that starts the toolkit's.
    says = f"echo '#$ _HERE_={path}/bin' >&2"
    monkeypatch.setenv("PATH", str(Path(script(tmp_path / "wrapper" / "nvcc", says)).parent), ":")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(environment)])
    assert found() == path


def test_readme_and_ci_install_the_toolkit_that_the_build_asks_for():
    command = cuda.install("13.0")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    wanted = (ROOT / "requirements" / "cuda.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert command == f"pip install '{wanted}'"


def test_a_rocm_torch_is_named(cuda_torch, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setenv("EFLAT_CUDA", "1")
    with pytest.raises(SystemExit, match="the installed torch is a ROCm build"):
        make_plan()


def test_the_compiler_given_is_nvccs_too(monkeypatch):
    for given, options in (
        ("/opt/gcc-13/bin/g++", ["-ccbin", "/opt/gcc-13/bin/g++"]),
        ("ccache clang++ -m64", ["-ccbin", "clang++", "-Xcompiler", "-m64"]),
        ("c++", []),
    ):
        monkeypatch.setenv("CXX", given)
        found = cuda.command(cuda.Toolkit(Path("/cuda"), "13.0"), ["9.0"], "x.cu", "x.o", False)
        start = found.index("-ccbin") if options else 0
        assert found[start : start + len(options)] == options
        assert ("-ccbin" in found) == bool(options)


def test_warnings_are_errors_where_that_is_asked_for(monkeypatch):
    for strict in (False, True):
        monkeypatch.setenv("EFLAT_WERROR", str(int(strict)))
        plan = make_plan()
        assert plan.warnings_are_errors == strict
        assert ("-Werror" in compiler.options(plan.warnings_are_errors)) == strict
        home = cuda.Toolkit(Path("/cuda"), "13.0")
        command = cuda.command(home, ["9.0", "12.1+PTX"], "x.cu", "x.o", strict)
        assert ("all-warnings" in command) == strict
        assert "arch=compute_90,code=sm_90" in command
        assert "arch=compute_121,code=compute_121" in command


def test_options_for_other_systems(monkeypatch):
    """As their manuals have them: neither has been tried."""
    monkeypatch.setattr(sys, "platform", "darwin")
    options = compiler.options(True)
    assert options[options.index("-fopenmp-simd") - 1] == "-Xclang"
    monkeypatch.setattr(sys, "platform", "win32")
    assert {"/std:c++20", "/WX", "/openmp:experimental"} <= set(compiler.options(True))
    assert compiler.find() == "MSVC"
    with pytest.raises(CannotBuild, match="CUDA kernels are built on Linux alone"):
        cuda.find_toolkit(torch)


def test_a_cuda_module_that_fails_is_left_out(capsys):
    plan = Plan(kernels=True, toolkit=cuda.Toolkit(Path("/cuda"), "13.0"), architectures=["9.0"])
    plan.give_up_cuda("nvcc failed")
    info = plan.build_info()
    assert info["kernels"] and not info["cuda"] and info["cuda_reason"] == "nvcc failed"
    assert capsys.readouterr().err == "eflat_ext: built without CUDA kernels: nvcc failed\n"


def test_build_info_returns_a_copy():
    info = eflat_ext.build_info()
    assert isinstance(info["cuda"], bool) and isinstance(info["kernels"], bool)
    assert bool(info["cuda_architectures"]) == info["cuda"]
    assert bool(info["reason"]) != info["kernels"] and bool(info["cuda_reason"]) != info["cuda"]
    assert info["torch_target"] == "2.11"
    assert bool(info["compiler"]) == info["kernels"]
    info["cuda"] = None  # a copy
    assert eflat_ext.build_info()["cuda"] is not None
