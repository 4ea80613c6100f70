"""What the build refuses, in one sentence, and what it says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import eflat_ext

ROOT = Path(__file__).parent.parent


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
def test_wrong_combinations(environment, message):
    result = setup("--version", **environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"eflat_ext: {message}")
    assert result.stderr.count("\n") == 1


def test_builds_against_an_installed_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    result = setup("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "it is built against the installed torch" in result.stderr
    assert result.stderr.count("\n") == 1


def test_build_info():
    info = eflat_ext.build_info()
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_architectures"]) == info["cuda"]
    assert info["torch_target"] == "2.11"
    assert info["compiler"]
    info["cuda"] = None  # a copy
    assert eflat_ext.build_info()["cuda"] is not None
