"""Every page of docs/ has a script that runs; the README's table is made from the tests."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import settings_table

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


# Options of scripts that by default train for longer.
FEWER = {
    "accelerate_loop": "--steps 4",
    "diffusers_unet": "--steps 10",
    "experiment": "--steps 2",
    "finetune": "--steps 4 --rows 300",
    "lightning_loops": "--steps 2",
    "other_tools": "--steps 60",
    "plain_loop": "--steps 2",
    "quantised": "--steps 2",
    "sentence_embeddings": "--steps 3",
    "sharpness": "--steps 4",
    "trainer": "--steps 12",
    "trl_sft": "--steps 8",
    "vision_language": "--steps 25 --train-questions 400 --test-questions 64",
}
CLAIMS = {
    "accelerate_loop": " 0 weights differ",
    "deepspeed_zero": "difference 0.0e+00",
    "diffusers_unet": "adapter's loss: 0\n",
    "faults": " 0 differing bits",
    "sentence_embeddings": "loaded adapter's embeddings: 0\n",
    "other_tools": "at rho 0, 0 weights differ",
    "lightning_loops": "Fabric: 0 weights differ",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs(script, tmp_path):
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script, *FEWER.get(script.stem, "").split()],
        cwd=tmp_path,
        env={**os.environ, **threads, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() and CLAIMS.get(script.stem, "") in done.stdout


def test_pages_and_scripts_belong_together():
    assert [page.stem for page in PAGES] == [script.stem for script in SCRIPTS]
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"python examples/{page.stem}.py" in page.read_text(encoding="utf-8"), page
        assert f"({page.name})" in index, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_tests_of_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for test in re.findall(r"test_\w+\.py", text):
        assert list((ROOT / "python_tests").rglob(test)), test


def test_messages_of_the_page_are_those_of_the_script():
    """The script provokes every row but the mixin's, and every mistake has a row."""
    script = importlib.import_module("examples.troubleshooting")
    provoked = [script.provoke(mistake).partition(": ")[2] for mistake in script.REMEDIES]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \|", page, flags=re.M)
    of_message = {
        message: [r for r in rows if re.match(re.escape(r).replace(r"\.\.\.", ".*"), message)]
        for message in provoked
    }
    assert all(len(named) == 1 for named in of_message.values()), of_message
    left = set(rows) - {row for named in of_message.values() for row in named}
    assert left == {"PerturbationMixin: both passes must see the same inputs"}


def test_table_of_settings_is_up_to_date():
    readme = settings_table.README.read_text(encoding="utf-8")
    assert readme == settings_table.readme_with(settings_table.table(), readme)
