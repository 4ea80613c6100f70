"""Make the table of settings in README.md from the tests' ``proves`` markers.

``python python_tests/support/settings_table.py`` writes it; a test checks that it is up to date.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"
SETTINGS = [
    "Plain loops",
    "Hugging Face Trainer",
    "Accelerate",
    "Lightning",
    "Fabric",
    "Several devices",
    "diffusers",
    "LoRA layers",
    "Quantised bases",
    "Vision-language",
    "Faults",
]


def markers() -> Iterator[tuple[str, str, Path, str]]:
    """Return setting, promise, file and name of every test that proves one."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.proves":
                    setting, promise = (ast.literal_eval(argument) for argument in call.args)
                    yield setting, promise, path, node.name


def table() -> str:
    """Return the table in Markdown.

    Raises:
        ValueError: a marker names an unknown setting.
    """
    lines = ["| setting | what holds | proved by |", "| --- | --- | --- |"]
    rows = sorted(markers(), key=lambda row: (SETTINGS.index(row[0]), row[2], row[1]))
    for setting, promise, path, name in rows:
        file = path.relative_to(README.parent)
        lines.append(f"| {setting} | {promise} | [`{name}`]({file}) |")
    return "\n".join(lines) + "\n"


def readme_with(table: str, readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(readme_with(table(), README.read_text(encoding="utf-8")), encoding="utf-8")
