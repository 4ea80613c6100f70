"""Fine-tune a classifier or a language model with several methods on equal terms; compare them.

Every method gets, for one seed, the same initial weights, the same batches in the same order
and the same schedule; only the optimizer differs. :func:`train` is one run, :func:`run` is
the grid of methods and seeds with its report.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eflat_ext.lab.data.texts import InputError, Texts
from eflat_ext.optim.factories import trainable_parameters

from . import loading, objective, run_folder, screen
from .config import FinetuneConfig
from .task import Result, Task, Tokens

if TYPE_CHECKING:
    from .loading import Model, Tokenizer

TRAIN_LOSS_SENTENCES = 1000


def prepare(config: FinetuneConfig) -> Task:
    """Read the data, find the model and the device, and turn the texts into tokens.

    Raises:
        InputError: something in ``config`` cannot be used; the message names it.
    """
    config.check()
    device = loading.find_device(config)
    splits = loading.read_splits(config)
    held_out: Texts = getattr(splits, config.evaluate_on)
    if not len(held_out):
        raise InputError(
            f"the {config.evaluate_on} part, to evaluate on, is empty"
            + splits.left_out.in_brackets()
        )

    path = loading.find_model(config.model)
    tokenizer = loading.load_tokenizer(path, config)
    train, evaluation = (encode(config, tokenizer, p) for p in (splits.train, held_out))
    return Task(path, tokenizer, splits, train, evaluation, device, count_steps(config, len(train)))


def count_steps(config: FinetuneConfig, sentences: int) -> int:
    """Return the number of optimizer steps of a run on so many training sentences."""
    return config.steps or max(1, round(config.epochs * sentences / config.batch_size))


def build(
    config: FinetuneConfig,
    task: Task,
    method: str,
    seed: int,
    methods: Mapping[str, Builder] | None = None,
) -> tuple[Model, torch.optim.Optimizer]:
    """Return the model, with new weights drawn by ``seed``, and the optimizer of ``method``.

    Args:
        config: the settings.
        task: from :func:`prepare`.
        method: key in ``methods``.
        seed: of the new weights.
        methods: functions that make optimizers, by name; by default :data:`METHODS`.

    Raises:
        InputError: the model cannot be loaded or takes no adapter of this kind.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        classes, pad = task.splits.classes, loading.text_tokenizer(task.tokenizer).pad_token_id
        base, new_modules = loading.load_model(task.model_path, config, classes, pad, method)
        full = method == "full"
        model: Model = base if full else loading.add_adapter(config, base, new_modules)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.to(task.device)  # type: ignore[arg-type]
    return model, (METHODS if methods is None else methods)[method](config, model, task.steps)


def train(
    config: FinetuneConfig,
    task: Task,
    method: str,
    seed: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Result:
    """Train what :func:`build` made, then evaluate the clean weights.

    Args:
        config: the settings.
        task: from :func:`prepare`.
        method: as given to :func:`build`.
        seed: of the batches and of dropout.
        model: from :func:`build`.
        optimizer: from :func:`build`.
        on_step: called after every step with its loss.
    """
    torch.manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_linear(config, task.steps))
    trainable = trainable_parameters(model)
    batches = shuffled_batches(task, config.batch_size, seed)
    losses, seconds = [], []
    if cuda := task.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(task.device)

    # Flat-LoRA and LoRA-SAM call this twice in a step, the others once.
    def closure() -> Any:
        inputs, labels = batch
        optimizer.zero_grad()
        loss = objective.loss_of(logits_of(config, model, inputs), labels)
        loss.backward()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        return loss.detach()

    model.train()
    for _ in range(task.steps):
        batch = next(batches)
        start = time.perf_counter()
        loss = optimizer.step(closure)
        schedule.step()
        losses.append(float(loss))  # waits for the device, so the clock sees the whole step
        seconds.append(time.perf_counter() - start)
        on_step(losses[-1])

    peak_memory = torch.cuda.max_memory_allocated(task.device) if cuda else None
    held_out_loss, accuracy = evaluate(config, task, model, task.held_out)
    some = slice(TRAIN_LOSS_SENTENCES)
    train_loss, _ = evaluate(
        config, task, model, Tokens(task.train.inputs[some], task.train.labels[some])
    )
    metrics = {
        "method": method,
        "seed": seed,
        "evaluated_on": config.evaluate_on,
        "accuracy": accuracy,
        "loss": held_out_loss,
        "train_loss": train_loss,
        "steps": task.steps,
        "seconds_per_step": statistics.median(seconds),
        "trainable_parameters": sum(p.numel() for p in trainable),
        "device": str(task.device),
    }
    if hasattr(optimizer, "skipped_perturbations"):
        metrics["skipped_perturbations"] = int(optimizer.skipped_perturbations)
    if peak_memory:
        metrics["peak_memory_mib"] = peak_memory / 2**20
    return Result(metrics, losses)


@torch.no_grad()
def evaluate(
    config: FinetuneConfig, task: Task, model: Model, tokens: Tokens
) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy (0 to 1) of ``model`` in eval mode.

    See :func:`objective.loss_of` and :func:`objective.count_right`.
    """
    model.eval()
    # Sentences of one length share a batch, so hardly anything is padding.
    order = sorted(range(len(tokens)), key=lambda i: len(tokens.inputs[i]["input_ids"]))
    loss, predictions, correct = 0.0, 0, 0
    # The logits of a language model are as many as its vocabulary, for every token.
    size = config.batch_size * (4 if config.task_type == "SEQ_CLS" else 1)
    for start in range(0, len(order), size):
        inputs, labels = collate(task, tokens, order[start : start + size])
        logits = logits_of(config, model, inputs)
        loss += objective.loss_of(logits, labels, reduction="sum").item()
        predictions += objective.count(labels)
        correct += objective.count_right(logits, labels)
    return loss / predictions, correct / len(tokens)


def run(config: FinetuneConfig) -> Path:
    """Run every method with every seed, show progress and a table, and write a run folder.

    Returns:
        The run folder: config.yaml, results.json, results.csv, loss.png, and for each run
        METHOD/seed-N with the adapter (the model for "full"), the tokenizer, classes.json,
        metrics.json and loss.csv.

    Raises:
        InputError: something in ``config`` cannot be used; the message names it.
    """
    config.check()
    folder = run_folder.free_folder(config.output_dir)
    task = prepare(config)
    screen.announce(config, task)
    results: list[Result] = []
    with screen.progress() as bars:
        for method, seed in itertools.product(config.method, config.seeds):
            model, optimizer = build(config, task, method, seed)
            if not results:
                # Not before: settings that the model cannot take leave no folder behind.
                run_folder.create_folder(folder, config, task)
            on_step = bars.start(f"{screen.TITLES[method]}, seed {seed}", task.steps)
            try:
                result = train(config, task, method, seed, model, optimizer, on_step)
            except torch.OutOfMemoryError:
                raise InputError(
                    f"{task.device} ran out of memory; lower --batch-size or --max-length, "
                    "or take --dtype bfloat16"
                ) from None
            with run_folder.writing(folder):
                run_folder.save_run(folder, result, model, task)
            results.append(result)
            del model, optimizer
            gc.collect()  # hooks may hold both in a reference cycle; the next run needs the memory
    with run_folder.writing(folder):
        summary = run_folder.finish(folder, results)
    screen.show_results(folder, config, summary, [result.metrics for result in results])
    return folder


# --- methods -----------------------------------------------------------------------------

# Makes the optimizer of a model that will take so many steps.
Builder = Callable[[FinetuneConfig, "Model", int], torch.optim.Optimizer]


def adamw_settings(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings of AdamW, the same for every method with an adapter."""
    return {"lr": config.lr, "weight_decay": config.weight_decay}


def _lora(config: FinetuneConfig, model: Model, steps: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable_parameters(model), **adamw_settings(config))


def _full(config: FinetuneConfig, model: Model, steps: int) -> torch.optim.Optimizer:
    return _lora(dataclasses.replace(config, lr=config.full_lr), model, steps)


def _perturbed(name: str) -> Builder:
    """Return the builder of an optimizer of this package, with its settings from the config."""
    settings = ["rho", "norm_scope"]
    settings += {"lora_sam": [], "flat": ["onto", "rtol"], "eflat": ["onto", "rtol", "beta"]}[name]

    def builder(config: FinetuneConfig, model: Model, steps: int) -> torch.optim.Optimizer:
        from eflat_ext.optim import factories

        create = getattr(factories, f"create_{name}_optimizer")
        own = {setting: getattr(config, setting) for setting in settings}
        try:
            optimizer: torch.optim.Optimizer = create(
                model, torch.optim.AdamW, **own, **adamw_settings(config)
            )
        except (ValueError, NotImplementedError) as error:
            method = name.replace("_", "-")
            raise InputError(f"--method {method}: {loading.first_line(error)}") from None
        return optimizer

    return builder


METHODS: dict[str, Builder] = {
    "lora": _lora,
    "eflat": _perturbed("eflat"),
    "flat": _perturbed("flat"),
    "lora-sam": _perturbed("lora_sam"),
    "full": _full,
}


def logits_of(
    config: FinetuneConfig, model: Model, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the model's logits, shape (texts, classes) or (texts, tokens, vocabulary)."""
    device = next(iter(inputs.values())).device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        logits: torch.Tensor = model(**inputs).logits
        return logits


def warmup_then_linear(config: FinetuneConfig, steps: int) -> Callable[[int], float]:
    """Return the function of ``LambdaLR``: the share of the peak learning rate at each step."""
    warm = round(config.warmup * steps)
    return lambda step: (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


# --- batches -----------------------------------------------------------------------------


def encode(config: FinetuneConfig, tokenizer: Tokenizer, part: Texts) -> Tokens:
    """Return the texts as the model's inputs, with their labels."""
    return Tokens(*objective.encode(config, tokenizer, part))


def shuffled_batches(
    task: Task, batch_size: int, seed: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yield shuffled batches, epoch after epoch, without end.

    The sentences of each 16 batches are sorted by length before they are cut into batches: with
    less padding, a step takes two thirds of the time.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(row["input_ids"]) for row in task.train.inputs]
    pool = 16 * batch_size
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=lengths.__getitem__)
            batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        for k in torch.randperm(len(batches), generator=generator).tolist():
            yield collate(task, task.train, batches[k])


def collate(
    task: Task, tokens: Tokens, rows: list[int]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the texts at ``rows`` as one padded batch, and their labels."""
    inputs, labels = [tokens.inputs[i] for i in rows], [tokens.labels[i] for i in rows]
    return objective.collate(task.tokenizer, inputs, labels, task.device)
