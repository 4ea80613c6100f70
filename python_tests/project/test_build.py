"""The build refuses wrong settings in one sentence, and records what it was built with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import eflat_ext

ROOT = Path(__file__).parents[2]


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"EFLAT_CUDA": "yes"}, "EFLAT_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {"EFLAT_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "CUDA_HOME is /nonexistent, which has no bin/nvcc and include/cuda_runtime.h",
        ),
    ],
)
def test_wrong_settings_are_named(environment, message):
    result = setup("--version", **environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"eflat_ext: {message}")
    assert result.stderr.count("\n") == 1


def test_a_missing_torch_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    result = setup("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "it is built against the installed torch" in result.stderr
    assert result.stderr.count("\n") == 1


def toolkit(folder: Path, *architectures: str) -> str:
    """Create the files of a CUDA toolkit that setup.py looks at before it compiles."""
    for name in ("include/cuda_runtime.h", "lib64/libcudart.so", "bin/nvcc"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    names = "".join(f"compute_{name}\\n" for name in architectures)
    (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\nprintf '{names}'\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    "given, built",
    [
        ("", ["8.0", "8.6", "8.9", "9.0+PTX"]),  # those of the toolkit below
        ("7.5 8.0; 9.0a+PTX", ["8.0", "9.0a+PTX"]),
        ("7.0;7.5", []),
    ],
)
def test_the_build_records_the_architectures(given, built, tmp_path):
    home = toolkit(tmp_path / "toolkit", "75", "80", "86", "87", "89", "90")
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = '13.0'\n")
    environment = {
        "EFLAT_CUDA": "auto",
        "CUDA_HOME": home,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(tmp_path),
        "TORCH_CUDA_ARCH_LIST": given,
    }
    result = setup("--quiet", "build_py", "--build-lib", str(tmp_path), **environment)
    assert result.returncode == 0, result.stderr
    assert ("need compute capability 8.0" in result.stderr) == ("7." in given)
    text = (tmp_path / "eflat_ext" / "_build_info.py").read_text()
    assert f"'cuda': {bool(built)}, 'cuda_architectures': {built}" in text


def test_unsupported_architectures_are_named(tmp_path):
    environment = {"EFLAT_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}
    new, old = toolkit(tmp_path / "new", "80"), toolkit(tmp_path / "old", "70", "75")
    result = setup("--version", **environment, CUDA_HOME=new, TORCH_CUDA_ARCH_LIST="7.0;7.5")
    assert result.returncode == 1
    assert "need compute capability 8.0 or higher, got 7.0, 7.5" in result.stderr
    result = setup("--version", **environment, CUDA_HOME=old, TORCH_CUDA_ARCH_LIST="")
    assert result.returncode == 1
    assert "need compute capability 8.0 or higher, got an nvcc without it" in result.stderr
    result = setup("--version", **environment, CUDA_HOME=new, TORCH_CUDA_ARCH_LIST="Ampere")
    assert result.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got 'Ampere'" in result.stderr


def test_build_info_returns_a_copy():
    info = eflat_ext.build_info()
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_architectures"]) == info["cuda"]
    assert info["torch_target"] == "2.11"
    assert info["compiler"]
    info["cuda"] = None  # a copy
    assert eflat_ext.build_info()["cuda"] is not None
