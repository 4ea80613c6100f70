"""The rooms of the package: what each may import, and how many modules it may hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(script), "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("ops/checks.py", "from eflat_ext import lora", "Rooms import downward"),
        ("lora.py", "from eflat_ext.perturbation import base", "Rooms import downward"),
        ("analysis/hessian.py", "from eflat_ext.optim import eflat", "The analysis knows no"),
        ("lab/data/texts.py", "from eflat_ext.lab.finetune import config", "The lab imports"),
        ("perturbation/steps.py", "from eflat_ext.perturbation import claims", "No circle"),
    ],
)
def test_an_import_against_the_order_fails_the_lint(tmp_path, file, line, contract):
    shutil.copytree(ROOT / "eflat_ext", tmp_path / "eflat_ext")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / "eflat_ext" / file
    planted.write_text(f"{planted.read_text(encoding='utf-8')}\n\n{line}\n", encoding="utf-8")
    done = lint(tmp_path)
    assert done.returncode == 1
    broken = [words for words in done.stdout.splitlines() if " BROKEN" in words]
    assert any(words.startswith(contract) for words in broken), done.stdout


def test_no_folder_holds_more_than_14_modules():
    folders = Counter(path.parent for path in (ROOT / "eflat_ext").rglob("*.py"))
    assert max(folders.values()) <= 14, folders
