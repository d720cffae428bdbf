"""Clocks on any device: wall time of eager calls, taken in turns, as medians with their spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Microseconds per call: median, 10th and 90th percentile of ``samples`` samples."""

    median: float
    p10: float
    p90: float
    samples: int


def spread(microseconds: Sequence[float]) -> Spread:
    """Median and percentiles (nearest rank) of one sample or more."""
    ordered = sorted(microseconds)

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Spread(statistics.median(ordered), rank(0.1), rank(0.9), len(ordered))


def synchronise(device: torch.device) -> None:
    """Waits until the device is done; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch(run: Run, calls: int, device: torch.device) -> float:
    """Seconds for ``calls`` calls and the wait for the last."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return time.perf_counter() - start


def walls(run: Run, device: torch.device, rounds: int) -> list[float]:
    """Microseconds of each of ``rounds`` calls, the device idle before and after."""
    synchronise(device)
    return [1e6 * _batch(run, 1, device) for _ in range(rounds)]


def _nothing_around(_: str) -> AbstractContextManager[Any]:
    return nullcontext()


def wall(
    runs: Mapping[str, Run],
    device: torch.device,
    rounds: int = 20,
    batch_seconds: float = 1e-3,
    around: Callable[[str], AbstractContextManager[Any]] = _nothing_around,
    failed: dict[str, Exception] | None = None,
) -> dict[str, Spread]:
    """Eager wall time per call of each run.

    A sample is a batch of calls that ends with one synchronisation, divided by its calls; a batch is long
    enough for ``batch_seconds``. The runs take turns, so that a disturbance or a drifting clock meets them all.
    ``around(name)`` stands around each batch, outside the clock. A run that raises has no time and its error in
    ``failed``; without ``failed`` the error is raised.
    """
    errors: dict[str, Exception] = {} if failed is None else failed

    def seconds_of(name: str, count: int) -> float:
        try:
            with around(name):
                return _batch(runs[name], count, device) / count
        except Exception as error:
            if failed is None:
                raise
            errors[name] = error.with_traceback(None)  # its frames would keep tensors alive
            return 0.0

    calls = {}
    for name in runs:
        seconds_of(name, 2)
        if name not in errors:
            calls[name] = max(1, min(1000, round(batch_seconds / max(seconds_of(name, 3), 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, count in calls.items():
            if name not in errors:
                seconds[name].append(seconds_of(name, count))
    return {name: spread([1e6 * s for s in samples]) for name, samples in seconds.items() if name not in errors}
