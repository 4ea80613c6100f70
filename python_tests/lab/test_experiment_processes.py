"""The processes of an experiment: their threads, and their end when one fails or all are killed."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from experiment_case import SHARPNESS, make_content, write

from eflat_ext.lab import cli
from eflat_ext.lab.data.texts import InputError
from eflat_ext.lab.experiment import runner
from eflat_ext.lab.finetune import comparison


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return make_content(tmp_path_factory.mktemp("experiment"))


@pytest.mark.parametrize("fails", [False, True])
def test_one_process_has_one_thread_while_it_runs(content, tmp_path, fails):
    seen = []

    def noting(config, model, steps):
        seen.append(torch.get_num_threads())
        return comparison.METHODS["lora"](config, model, steps)

    layers = ["none"] if fails else SHARPNESS["layers"]
    path = write(
        tmp_path,
        content,
        methods={"noting": {}},
        seeds=[0],
        sharpness={**SHARPNESS, "layers": layers},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(InputError) if fails else contextlib.nullcontext():
            runner.run(path, methods={"noting": noting})
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert seen == [1]


def endless(config, model, steps):
    Path(config.data).with_name("begun").touch()
    time.sleep(600)


def after_endless(config, model, steps):
    while not Path(config.data).with_name("begun").exists():
        time.sleep(0.1)
    return comparison.METHODS["lora"](config, model, steps)


def test_an_error_ends_the_runs_of_other_processes(content, tmp_path):
    data = Path(shutil.copy(content["settings"]["data"], tmp_path / "data.csv"))
    path = write(
        tmp_path,
        content,
        settings={**content["settings"], "data": str(data)},
        methods={"endless": {}, "after": {}},
        seeds=[0],
        sharpness={**SHARPNESS, "layers": ["qurey"]},
    )
    others = multiprocessing.active_children()  # of other tests

    def workers():
        return [child for child in multiprocessing.active_children() if child not in others]

    try:
        with pytest.raises(InputError, match=r"sharpness, method 'after' .*\['qurey'\]"):
            runner.run(path, jobs=2, methods={"endless": endless, "after": after_endless})
        deadline = time.monotonic() + 20
        while workers():
            assert time.monotonic() < deadline, "a worker goes on, and Python's exit would wait"
            time.sleep(0.1)
    finally:
        for worker in workers():
            worker.kill()


def children_of(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def is_running(process):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def test_a_killed_command_takes_its_processes_with_it(content, tmp_path):
    data = Path(shutil.copy(content["settings"]["data"], tmp_path / "data.csv"))
    settings = {**content["settings"], "data": str(data)}
    path = write(tmp_path, content, settings=settings, methods={"endless": {}}, seeds=[0])
    script = (
        "import sys; from pathlib import Path; from eflat_ext.lab.experiment import runner\n"
        "from test_experiment_processes import endless\n"
        "runner.run(Path(sys.argv[1]), jobs=2, methods={'endless': endless})"
    )
    command = [sys.executable, "-c", script, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    workers = []
    try:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        workers = children_of(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "a worker goes on without its parent"
            time.sleep(0.1)
    finally:
        process.kill()
        for worker in filter(is_running, workers):
            os.kill(int(worker), signal.SIGKILL)
    assert workers


def test_a_pool_that_breaks_between_runs_is_one_sentence(content, tmp_path, capsys, monkeypatch):
    @contextlib.contextmanager
    def workers(*_):
        def submit(run):
            raise BrokenProcessPool("a worker was killed after its last run")

        yield submit

    monkeypatch.setattr(runner, "_workers", workers)
    assert cli.main(["experiment", str(write(tmp_path, content)), "--jobs", "2"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("eflat: a process was killed, ")
