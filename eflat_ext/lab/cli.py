"""Parse the command line of ``eflat`` and call what implements each command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

# What the command needs beside torch: the optional dependencies "finetune" of pyproject.toml.
PACKAGES = "peft transformers cyclopts pydantic rich PyYAML matplotlib"
try:
    import cyclopts
    import pydantic
    from cyclopts import App, Parameter

    from .data.corpora import CORPORA
    from .data.texts import InputError
    from .data.validation import first_error, read_yaml
    from .finetune.config import FinetuneConfig
    from .measure.landscape_figure import LandscapeConfig
    from .measure.sharpness_table import SharpnessConfig
except ModuleNotFoundError as missing:
    sys.exit(f"eflat: {missing}; the command needs: pip install {PACKAGES}")


def _version() -> str:
    from .finetune.versions import versions

    return "\n".join(f"{name} {version}" for name, version in versions().items())


def _add_settings_of_file(
    app: App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection
) -> None:
    """Set from the file of --config the options that the command line leaves out."""
    for argument in arguments:
        if argument.name == "--config" and argument.tokens:
            path = Path(argument.tokens[-1].value)
            settings = _read_config(path)
            if "config" in settings:
                raise InputError(f"--config {path} names a file of settings itself")
            cyclopts.config.Dict(settings, source=str(path), use_commands_as_keys=False)(
                app, commands, arguments
            )


def _check_whole_numbers(
    _app: App, _commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection
) -> None:
    """Refuse fractions for whole numbers, which cyclopts would round."""
    for argument in arguments:
        for token in argument.tokens:
            if _holds_int(argument.hint) and "." in token.value:
                where = "" if token.source == "cli" else f" in {token.source}"
                raise InputError(
                    f"{argument.name} must be a whole number, got {token.value!r}{where}"
                )


def _holds_int(hint: Any) -> bool:
    return hint is int or any(map(_holds_int, get_args(hint)))


def _read_config(path: Path) -> dict[str, Any]:
    settings = read_yaml(path, f"--config {path}")
    if not isinstance(settings, dict):
        raise InputError(f"--config {path} holds no settings, one 'name: value' a line")
    try:
        json.dumps(settings, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # odd keys, a value within itself
        raise InputError(f"--config {path} holds what is no setting: {error}") from None
    return settings


app = App(
    name="eflat",
    help="EFlat-LoRA: sharpness-aware fine-tuning of LoRA adapters with one gradient a step.",
    version=_version,
    version_format="plaintext",  # which keeps the lines
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(consume_multiple=True, negative=()),
    config=(_add_settings_of_file, _check_whole_numbers),
)


@app.command
def experiment(
    file: Path,
    *,
    task: list[str] | None = None,
    method: list[str] | None = None,
    jobs: int = 1,
    retry_failed: bool = False,
    methods: Annotated[Mapping[str, Callable[..., Any]] | None, Parameter(parse=False)] = None,
) -> None:
    """Run a grid of tasks, methods, tuned values and seeds; resume it if it was interrupted.

    Args:
        file: YAML file of the experiment; bench/experiments/ has some.
        task: run only this task of the file; may be given several times.
        method: run only this method, and the one named by its `like`; may be given several times.
        jobs: processes, each with one thread.
        retry_failed: repeat the runs that failed before.
        methods: further ones, by name; for bench/experiment.py.
    """
    from .experiment.runner import run

    parts = {"task": task or (), "method": method or ()}
    run(file, **parts, jobs=jobs, retry_failed=retry_failed, methods=methods)


@app.command
def finetune(
    settings: Annotated[FinetuneConfig, Parameter(name="*")] | None = None,
    *,
    config: Path | None = None,
) -> None:
    """Fine-tune a model with several methods on equal terms and compare them.

    Without options: plain LoRA and EFlat-LoRA on a small pretrained model and 10,000 sentences
    of movie reviews, in three to four minutes on two CPU cores. Results go to a new run folder.

    Args:
        config: YAML file of settings, such as the config.yaml of a run folder; options on
            the command line win over it.
    """
    from .finetune.comparison import run

    del config  # its settings are in the others by now
    run(settings or FinetuneConfig())


@app.command
def sharpness(
    where: list[Path],
    /,
    *,
    settings: Annotated[SharpnessConfig, Parameter(name="*")] | None = None,
) -> None:
    """Measure the sharpness of the minima that a fine-tune has found.

    The rise of the loss in the full space of the adapted layers: at the worst point of a radius
    (to first order, along the true gradient of the whole weights), at the point that EFlat-LoRA's
    transfer onto B finds, and at random points.

    Args:
        where: run folders of eflat finetune, single METHOD/seed-N folders of them, or folders with
            a PEFT adapter (these need --data).
    """
    from .measure.sharpness_table import run

    run(where, settings or SharpnessConfig())


@app.command
def landscape(
    where: list[Path],
    /,
    *,
    settings: Annotated[LandscapeConfig, Parameter(name="*")] | None = None,
) -> None:
    """Draw slices of the loss around trained models, all on one scale.

    In the full space of the adapted layers, along random directions, eigenvectors of the Hessian,
    or the line between adapters. Writes a figure and its numbers as CSV.

    Args:
        where: run folders of eflat finetune, single METHOD/seed-N folders of them, or folders with
            a PEFT adapter (these need --data).
    """
    from .measure.landscape_figure import run

    run(where, settings or LandscapeConfig())


def _message(error: Exception) -> str:
    """Return an error of the input as one sentence."""
    if isinstance(error, cyclopts.UnusedCliTokensError):
        word = (error.unused_tokens or [""])[0]
        meant = word in CORPORA or Path(word).suffix.lower() in (".csv", ".tsv", ".jsonl")
        advice = f"; data is given as --data {word}" if meant else ""
        return f"{word!r} belongs to no option{advice}"
    if isinstance(error.__cause__, pydantic.ValidationError):  # cyclopts knows pydantic's types
        argument = getattr(error, "argument", None)
        return first_error(error.__cause__, argument.name if argument else "")
    return str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: command line to parse, by default the process's own.

    Returns:
        The exit code: 0, or 2 if the input cannot be used (with one sentence on standard
        error), or 130 after Ctrl-C.

    Raises:
        SystemExit: with a sentence, which makes code 1, if runs of an experiment have failed.
    """
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (cyclopts.CycloptsError, InputError) as error:
        # Arguments may be bytes that are no text.
        reason = " ".join(_message(error).split()).encode("utf-8", "backslashreplace").decode()
        if len(reason) > 700:  # something long was given: its beginning will do
            reason = f"{reason[:500]} ... {reason[-150:]}"
        print(f"eflat: {reason}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"eflat: {error}; the command needs: pip install {PACKAGES}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eflat: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
