"""What tests of `fera-ext bench` share: the command, options, and a fake of torch.cuda."""

from __future__ import annotations

import itertools
import time
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from fera_ext.bench import cases, runner, timing_cuda
from fera_ext.cli import app


@pytest.fixture(autouse=True)
def no_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FERA_BAND_VARIANT", "FERA_EXPERT_VARIANT"):
        monkeypatch.setenv(name, "")  # and puts back what a test's --variant leaves


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu"])


def options(operator: str = "band_energy", **more: Any) -> cases.Options:
    return cases.Options.parse(operator, shapes="2x4x24x40", device="cpu", rounds=3, batch_seconds=0.0, **more)


class FakeCuda:
    """A GPU whose graphs replay in the time their capture took."""

    now = 0.0

    class CUDAGraph:
        pools: ClassVar[list[int]] = []
        alive: ClassVar[set[int]] = set()

        def capture_begin(self, pool: int, capture_error_mode: str = "global") -> None:
            self.pools.append(pool)
            self.alive.add(id(self))
            weakref.finalize(self, self.alive.discard, id(self))
            self.start = time.perf_counter()

        def capture_end(self) -> None:
            self.milliseconds = 1e3 * (time.perf_counter() - self.start)

        def reset(self) -> None:
            self.alive.discard(id(self))

        def replay(self) -> None:
            FakeCuda.now += self.milliseconds

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = FakeCuda.now

        def elapsed_time(self, other: FakeCuda.Event) -> float:
            return max(other.time - self.time, 1e-3)


@pytest.fixture(name="fake_cuda")
def fake_cuda_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=4096)
    FakeCuda.CUDAGraph.pools.clear()
    FakeCuda.CUDAGraph.alive.clear()
    handles = itertools.count()
    for name, value in {
        "CUDAGraph": FakeCuda.CUDAGraph,
        "Event": FakeCuda.Event,
        "Stream": lambda device: None,
        "stream": lambda stream: torch.enable_grad(),
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda device: (1 << 21, 1 << 21),
        "memory_allocated": lambda device: 1 << 20,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 3 << 20,
        "_sleep": lambda cycles: None,
        "graph_pool_handle": lambda: next(handles),
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    monkeypatch.setattr(runner, "gpu_timer", lambda o: timing_cuda.GpuTimer(o.device, o.rounds))
