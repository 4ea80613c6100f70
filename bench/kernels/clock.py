"""Time functions on a GPU by CUDA events, eager and as a CUDA graph, with warm and cold caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# More than any L2 cache holds (126 MB on the largest card today).
EVICTED_BYTES = 512 * 2**20


class Clock:
    """Times functions on a device; on the CPU by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        size = EVICTED_BYTES if self.cuda else 2**20
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(
        self,
        function: Callable[[], object],
        cold: bool = False,
        budget: float = 0.3,
        most: int = 200,
    ) -> float:
        """Return the median seconds of a call.

        Args:
            function: The function to time.
            cold: Fill the caches with other data before each call.
            budget: Seconds for all calls together, of which there are 3 to ``most``.
            most: Largest number of calls.
        """
        function()  # warm-up: allocations, libraries, compilation
        self.synchronize()
        begin = time.perf_counter()
        function()
        self.synchronize()
        runs = int(min(most, max(3, budget / (time.perf_counter() - begin))))
        marks = []
        for _ in range(runs):
            if cold:
                self._buffer.zero_()
            start = self._mark()
            function()
            marks.append((start, self._mark()))
        self.synchronize()
        if self.cuda:
            return statistics.median(a.elapsed_time(b) / 1e3 for a, b in marks)
        return statistics.median(b - a for a, b in marks)

    def graphed(self, function: Callable[[], object]) -> tuple[Callable[[], object] | None, str]:
        """Return a replay of the function's CUDA graph, or None and the reason."""
        if not self.cuda:
            return None, "no graphs on the CPU"
        try:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                function()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = function()
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            return None, str(error).split("\n")[0]

        def replay():
            graph.replay()
            return outputs

        return replay, ""

    def launches(self, function: Callable[[], object]) -> tuple[int, int]:
        """Return the numbers of kernels and of copies and fills of a call."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=activities) as profiler:
            function()
            self.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        names = [e.name for e in profiler.events() if e.device_type == on_device]
        copies = sum(name.startswith("Mem") for name in names)
        return len(names) - copies, copies

    def copy_bandwidth(self) -> float:
        """Return the bytes per second that a large copy within the device reads and writes."""
        source = torch.ones(2**30 if self.cuda else 2**20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))
