"""Every page of docs/ has a script that runs as it stands; the README's table is the tests' own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import settings_table

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_runs(script, tmp_path):
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, **threads, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_pages_and_scripts_belong_together():
    assert [page.stem for page in PAGES] == [script.stem for script in SCRIPTS]
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"python examples/{page.stem}.py" in page.read_text(encoding="utf-8"), page
        assert f"({page.name})" in index, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_shows_lines_of_its_script(page):
    """Blocks of a page that are no lines of its script would never be run."""
    script = (ROOT / "examples" / f"{page.stem}.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in script.splitlines()}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    shown = [line.strip() for block in blocks for line in block.splitlines()]
    assert [line for line in shown if line and line != "..." and line not in lines] == []


def test_table_of_settings_is_up_to_date():
    readme = settings_table.README.read_text(encoding="utf-8")
    assert readme == settings_table.readme_with(settings_table.table(), readme)
