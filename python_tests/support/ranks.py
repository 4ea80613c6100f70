"""Processes that form groups: started once, and given one function after another to run."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds for one function, imports included
_pool: list[tuple[Any, Connection]] = []


def together(world: int, function: str, *args: Any, **kwargs: Any) -> list[Any]:
    """What ``function`` ("module:name") returns on each of ``world`` ranks of a gloo group.

    An AssertionError with the tracebacks of all ranks if one raises or does not answer.
    """
    _start(world)
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, connection) in enumerate(_pool[:world]):
            connection.send((world, rank, folder, function, args, kwargs))
        answers: list[Any] = []
        for _, connection in _pool[:world]:
            if not connection.poll(TIMEOUT):
                stop()
                raise AssertionError(f"{function}: a rank did not answer; others said {answers}")
            try:
                answers.append(connection.recv())
            except EOFError:
                stop()
                raise AssertionError(f"{function}: a rank died; others said {answers}") from None
    failed = {rank: text for rank, (_, text) in enumerate(answers) if text}
    if failed:
        raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, text in failed.items()))
    return [value for value, _ in answers]


def stop() -> None:
    """End the processes."""
    while _pool:
        process, connection = _pool.pop()
        connection.close()
        process.kill()
        process.join()


def _start(count: int) -> None:
    context = multiprocessing.get_context("spawn")
    while len(_pool) < count:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        before = dict(os.environ)
        os.environ.update(settings)
        try:
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        there.close()
        _pool.append((process, here))


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            world, rank, folder, function, args, kwargs = connection.recv()
        except EOFError:
            return
        count = str(world)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", LOCAL_WORLD_SIZE=count)
        try:
            store = dist.FileStore(str(Path(folder, "store")), world)
            wait = timedelta(seconds=TIMEOUT / 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
            module, name = function.split(":")
            value = getattr(importlib.import_module(module), name)(*args, **kwargs)
            dist.barrier()
            answer = value, ""
        except BaseException:
            answer = None, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)
