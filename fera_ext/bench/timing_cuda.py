"""Clocks of a CUDA GPU: calls captured in CUDA graphs, warm and cold L2, launches, and the floor.

All work runs on one stream that is not the default one, so that autograd, CuPy and capture agree on it.

Warm: one graph holds 50 calls; CUDA events around its replay, divided by 50.

Cold: one graph holds ten times (flush, call), another ten times the flush alone; a flush writes a buffer of
twice the L2. A sample is the difference of their replays, taken one right after the other, divided by ten.
Events around a graph of one call would have to subtract the replay's own start, about 3 us and more than some
of the calls; in the difference it cancels, the kernels' boundaries are those of the warm figure, and the
flush's noise is averaged over ten. The reads of the call evict the flush's dirty lines, as they would evict
those of the layers before it in a model.

Where one call takes long, a graph holds fewer of them and there are fewer rounds (:func:`plan`).

Before each round the GPU is held busy by a short spin, so that the replays queue up behind it and no
sample contains the host's launch time.

The graphs of a case share one pool of memory (:meth:`GpuTimer.shared_memory`): replays follow one another on one
stream, each computes everything it reads there from tensors made before any capture, and no call's outputs are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import cuda

from fera_ext.bench.timing import Run, Spread, spread

CALLS = 50
COLD_CALLS = 10
COLD_TRIES = 3
"""How often a cold time is taken before it is given up: another process's work on the GPU, longer than the calls, may
fall into the flushes alone, and a difference that is not positive is no time."""
COUNT_TRIES = 2
SPIN = 400_000
"""Clock cycles the GPU spins before each round, about 0.2 ms: ahead of the host by more than a launch."""
COPY_BYTES = 1 << 30
PRODUCT_SIDE = 8192
EMPTY = "The CUDA Graph is empty"
"""How torch's warning of a capture without any work begins."""
ROUND_US, CASE_US = 20e3, 200e3
"""What a round of all contenders, and all rounds of a case, should take on the GPU where calls are long."""


@dataclass(frozen=True)
class Plan:
    """Calls a graph, warm and cold, of each contender, and rounds."""

    warm: dict[str, int]
    cold: dict[str, int]
    rounds: int


def plan(microseconds: Mapping[str, float], rounds: int) -> Plan:
    """At most 50 and 10 calls a graph, at least 2, so that a round stays under 20 ms; 5 rounds or more.

    Args:
        microseconds: what a call takes on the GPU, roughly.
        rounds: as many as there may be.
    """
    share = ROUND_US / max(1, len(microseconds))
    fits = {name: int(share / max(t, 0.1)) for name, t in microseconds.items()}
    warm = {name: max(2, min(CALLS, n)) for name, n in fits.items()}
    cold = {name: max(2, min(COLD_CALLS, n)) for name, n in fits.items()}
    together = sum(warm[name] * t for name, t in microseconds.items())
    return Plan(warm, cold, min(rounds, max(5, int(CASE_US / max(together, 1.0)))))


class GpuTimer:
    """Captures and replays on a stream of its own; use it inside ``with timer.stream_context():``.

    Args:
        device: a CUDA device.
        rounds: samples of each time.
    """

    def __init__(self, device: torch.device, rounds: int = 20) -> None:
        self.device = device
        self.rounds = rounds
        self.stream = cuda.Stream(device)
        self.l2_bytes = int(getattr(cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        self._buffer: torch.Tensor | None = None
        self._flushes: dict[int, Any] = {}
        self._pool: Any = None
        self._failed: list[Any] = []

    def stream_context(self) -> Any:
        """The timer's stream as the current one."""
        return cuda.stream(self.stream)

    def flush(self) -> None:
        """Writes twice the L2's size."""
        if self._buffer is None:
            self._buffer = torch.empty(2 * self.l2_bytes // 4, dtype=torch.float32, device=self.device)
        self._buffer.fill_(1.0)

    def touch(self) -> None:
        """A backward pass of one number, before any other: autograd's thread launches a kernel, which makes the
        device's context current there. cuBLAS, were it the first, would find none and warn."""
        one = torch.ones(1, device=self.device, requires_grad=True)
        torch.autograd.grad((one * 2).sum(), one)
        cuda.synchronize(self.device)

    @contextmanager
    def shared_memory(self) -> Iterator[None]:
        """Graphs captured inside share one pool of memory; they must be dropped before the end."""
        # A capture may not give back what earlier graphs and calls have left in torch's caches.
        cuda.empty_cache()
        self._pool = cuda.graph_pool_handle()
        try:
            yield
        finally:
            self._pool = None
            cuda.empty_cache()

    def capture(self, run: Run, calls: int = CALLS, before: Run | None = None, alone: bool = False) -> Any:
        """A graph of ``calls`` times (``before``, ``run``), both already warm.

        Args:
            run, before: single calls.
            calls: how many the graph holds.
            alone: with memory of its own even inside :meth:`shared_memory`: the graph may outlive it.

        Raises:
            RuntimeError: something in the run cannot be captured, or nothing was.
        """
        graph = cuda.CUDAGraph()
        pool = cuda.graph_pool_handle() if alone or self._pool is None else self._pool
        cuda.synchronize()
        # Of this thread: what another one does meanwhile (a pinned copy, a tracker) must not end the capture.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            for _ in range(calls):
                if before is not None:
                    before()
                run()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=EMPTY)
                graph.capture_end()
        except BaseException as error:
            self._abandon(graph, pool)
            if isinstance(error, Warning):
                raise RuntimeError("capture: run must put work on the current stream, got an empty graph") from None
            raise
        return graph

    def _abandon(self, graph: Any, pool: Any) -> None:
        """Ends a capture that failed; the end's own complaint is the same failure again."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=EMPTY)
                graph.capture_end()
        except RuntimeError:
            # An invalidated capture ends before torch tells its allocator, which would go on as if one were under
            # way and never give cached memory back.
            with suppress(AttributeError, RuntimeError):
                index = cuda.current_device()
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
            self._failed.append(graph)  # torch may still point to it
        graph.reset()
        if self._pool is not None:
            # A pool whose last graph has died, or whose capture has not ended, takes no other.
            self._pool = cuda.graph_pool_handle()
        cuda.empty_cache()

    def replays(self, graphs: Mapping[str, Any], rounds: int | None = None) -> dict[str, list[float]]:
        """Microseconds of each replay of each graph, one a round, in turns."""
        rounds = rounds or self.rounds
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in graphs}
        for _ in range(rounds + 1):
            cuda._sleep(SPIN)
            for name, graph in graphs.items():
                start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                marks[name].append((start, end))
        cuda.synchronize()
        # The first round finds cold instruction caches.
        return {name: [1e3 * s.elapsed_time(e) for s, e in pairs[1:]] for name, pairs in marks.items()}

    def warm(
        self, graphs: Mapping[str, Any], calls: int | Mapping[str, int] = CALLS, rounds: int | None = None
    ) -> dict[str, Spread]:
        """Time per call of graphs of ``calls`` calls."""
        each = _each(calls, graphs)
        return {name: spread([t / each[name] for t in times]) for name, times in self.replays(graphs, rounds).items()}

    def cold(
        self, graphs: Mapping[str, Any], calls: int | Mapping[str, int] = COLD_CALLS, rounds: int | None = None
    ) -> dict[str, Spread]:
        """Time per call with a flushed L2, of graphs of ``calls`` calls captured with :meth:`flush` before each.

        A graph whose median is not positive is measured again; after ``COLD_TRIES`` it is left out.
        """
        each = _each(calls, graphs)
        found: dict[str, Spread] = {}
        for _ in range(COLD_TRIES):
            # The flush is measured beside each graph of the round, not once a round: pairs are neighbours.
            pairs: dict[str, Any] = {}
            for name in (name for name in graphs if name not in found):
                pairs[f"{name} flush"] = self._flush_graph(each[name])
                pairs[name] = graphs[name]
            if not pairs:
                break
            times = self.replays(pairs, rounds)
            for name in (name for name in graphs if name in pairs):
                differences = [both - flush for both, flush in zip(times[name], times[f"{name} flush"])]
                taken = spread([t / each[name] for t in differences])
                if taken.median > 0:
                    found[name] = taken
        return found

    def _flush_graph(self, calls: int) -> Any:
        if calls not in self._flushes:
            self.flush()
            self._flushes[calls] = self.capture(self.flush, calls, alone=True)
        return self._flushes[calls]

    def empty(self) -> Spread:
        """A kernel of one thread that does nothing, per launch of 50 in one graph."""
        run = _nothing
        run()
        return self.warm({"empty": self.capture(run)})["empty"]

    def copy_rate(self) -> tuple[int, float]:
        """(bytes of the copied buffer, GB/s read and written) of a plain copy; 1 GiB where it fits."""
        free, _ = cuda.mem_get_info(self.device)
        size = COPY_BYTES
        while size > 1 << 20 and 3 * size > free:
            size //= 2
        source = torch.zeros(size // 4, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        # Not captured: a graph may give a copy to the copy engines, which are slower.
        rate = self.warm({"copy": Calls(lambda: target.copy_(source), 4)}, 4)["copy"]
        return size, 2 * size / rate.median / 1e3

    def product_rate(self, dtype: torch.dtype) -> tuple[int, float]:
        """(side n, TFLOP/s) of a plain n × n × n product of random numbers; 8192 where it fits."""
        free, _ = cuda.mem_get_info(self.device)
        side = PRODUCT_SIDE
        while side > 64 and 4 * side * side * dtype.itemsize > free:
            side //= 2
        # Random: zeros draw less power, and the clocks would be higher than any real product's.
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        out = torch.mm(a, b)
        rate = self.warm({"product": Calls(lambda: torch.mm(a, b, out=out), 4)}, 4)["product"]
        return side, 2 * side**3 / rate.median / 1e6

    def peak_bytes(self, run: Run) -> int:
        """What torch allocates at most during a call beyond what stood before it: answers and all between."""
        cuda.synchronize(self.device)
        before = cuda.memory_allocated(self.device)
        cuda.reset_peak_memory_stats(self.device)
        run()
        cuda.synchronize(self.device)
        return int(cuda.max_memory_allocated(self.device) - before)


def _each(calls: int | Mapping[str, int], names: Mapping[str, Any]) -> Mapping[str, int]:
    return dict.fromkeys(names, calls) if isinstance(calls, int) else calls


class Calls:
    """Plain calls where a graph is expected.

    Args:
        run: one call.
        calls: how many a replay makes.
    """

    def __init__(self, run: Run, calls: int) -> None:
        self.run, self.calls = run, calls

    def replay(self) -> None:
        """All the calls."""
        for _ in range(self.calls):
            self.run()


def _nothing() -> None:
    cuda._sleep(0)


def launches(runs: Sequence[Run]) -> list[int | None]:
    """Kernels, copies and fills on the device per call of each run, counted by torch.profiler.

    One session for all, after every clock has stopped: a profiler slows later launches down. Runs of which it has seen
    nothing get another one: its buffers may overflow, or be another profiler's, for a while.
    """
    counts: list[int | None] = [None] * len(runs)
    for _ in range(COUNT_TRIES):
        left = [index for index, count in enumerate(counts) if count is None]
        if not left:
            break
        for index, count in zip(left, _profiled([runs[index] for index in left])):
            counts[index] = count
    return counts


def _profiled(runs: Sequence[Run]) -> list[int | None]:
    """One session of :func:`launches`."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as session:
        _nothing()  # the first activities of a session may be lost
        cuda.synchronize()
        for index, run in enumerate(runs):
            with record_function(f"{MARK}{index}"):
                run()
                cuda.synchronize()
    return count_launches(list(session.events() or ()), len(runs))


MARK = "fera_bench_call_"
NOT_LAUNCHES = ("Activity Buffer", "Command Buffer", "Context Sync", "Stream Sync", "Event Sync")


def count_launches(events: Sequence[Any], runs: int) -> list[int | None]:
    """Device activities inside each marked span; None where no activity was seen at all.

    Args:
        events: a profiler's events: name, device_type, time_range (start, end).
        runs: how many spans were marked.
    """
    on_device = torch.autograd.DeviceType.CUDA
    spans: dict[int, Any] = {}
    starts = []
    for event in events:
        marked = event.name.startswith(MARK)
        if event.device_type == on_device:
            if not marked and not event.name.startswith(NOT_LAUNCHES):
                starts.append(event.time_range.start)
        elif marked:
            spans[int(event.name[len(MARK) :])] = event.time_range
    counts: list[int | None] = []
    for index in range(runs):
        span = spans.get(index)
        inside = 0 if span is None else sum(span.start <= s <= span.end for s in starts)
        counts.append(inside or None)
    return counts
