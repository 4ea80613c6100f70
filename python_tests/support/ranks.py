"""Run functions on the ranks of process groups, in processes that are started once."""

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

import forked

TIMEOUT = 120  # seconds for one function, imports included
_pool: list[tuple[Any, Connection]] = []


def together(world: int, function: str, *args: Any, **kwargs: Any) -> list[Any]:
    """Run ``function`` ("module:name") on ``world`` ranks of a gloo group; return their results.

    Raises:
        AssertionError: a rank raised or did not answer; with the tracebacks of all ranks.
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
    while len(_pool) < count:
        here, there = multiprocessing.Pipe()
        _pool.append((forked.start("fsdp_cases", _serve, there), here))
        there.close()


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
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
