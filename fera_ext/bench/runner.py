"""Runs the cases: builds, checks, captures, times in turns, and collects rows."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from fera_ext.bench import timing_cuda
from fera_ext.bench.cases import LIMIT, OURS, Absent, Case, Contender, Options, is_ours
from fera_ext.bench.peers_torch import Compiler
from fera_ext.bench.timing import Spread, synchronise, wall

Made = TypeVar("Made")


def gpu_timer(options: Options) -> timing_cuda.GpuTimer | None:
    """The GPU's clocks, None on a CPU."""
    return timing_cuda.GpuTimer(options.device, options.rounds) if options.device.type == "cuda" else None


class Session:
    """What the cases of one run share.

    Attributes:
        options: the run's.
        device, dtype: where, and the latents' dtype.
        timer: the GPU's clocks, None on a CPU.
        compiler: torch.compile with its time limit.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = options.device
        self.dtype = options.dtype
        self.compiler = Compiler(options.compile_seconds)
        self.timer = gpu_timer(options)
        self._picked: dict[Hashable, str] = {}
        self._shared: dict[Hashable, Any] = {}

    def context(self) -> Any:
        """The timer's stream as the current one; nothing on a CPU."""
        return self.timer.stream_context() if self.timer else nullcontext()

    def shared(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What several cases use, made once a ``key``."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def fastest(self, key: Hashable, contenders: Mapping[str, Contender]) -> str:
        """The name of the fastest formulation, measured once a ``key``: GPU time, or wall time on a CPU."""
        if len(contenders) == 1:
            return next(iter(contenders))
        if key not in self._picked:
            runs = {name: c.run for name, c in contenders.items()}
            times: Mapping[str, Spread] = wall(runs, self.device, rounds=3, batch_seconds=0.0)
            if self.timer:
                with suppress(RuntimeError):  # what cannot be captured is compared by wall time
                    times = self.timer.warm({name: self.timer.capture(run, 5) for name, run in runs.items()}, 5)
            self._picked[key] = min(times, key=lambda name: times[name].median)
        return self._picked[key]

    def warm_up(self, contender: Contender) -> tuple[Tensor, ...]:
        """Three calls; the last one's answers."""

        def calls() -> tuple[Tensor, ...]:
            contender.call()
            contender.call()
            found = contender.call()
            answers = tuple(t.detach().clone() for t in (contender.arrange or tuple)(found))
            synchronise(self.device)
            return answers

        return self.compiler.timed(calls) if contender.compiles else calls()


def relative_error(answers: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> float:
    """The largest ‖answer − ours‖ / ‖ours‖ of the tensors, in float64; NaN where one is NaN.

    Raises:
        ValueError: other shapes or another number of tensors.
    """
    if [a.shape for a in answers] != [o.shape for o in ours]:
        raise ValueError(f"answers must be of shapes {[tuple(o.shape) for o in ours]}, got {[*map(_shape, answers)]}")
    pairs = [(a.double(), o.double()) for a, o in zip(answers, ours)]
    errors = [float((a - o).norm() / o.norm().clamp_min(1e-30)) for a, o in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


class _Entry:
    """A contender of a case with what is known of it."""

    def __init__(self, contender: Contender, case: Case, options: Options) -> None:
        self.contender = contender
        self.row: dict[str, Any] = {
            "operator": case.operator,
            "shape": case.shape,
            **case.fields,
            "bands": case.bands,
            "pass": case.pass_name,
            "implementation": contender.name,
            "form": contender.form,
            "dtype": str(options.dtype).removeprefix("torch."),
            "error": None,
            "warm_us": None,
            "cold_us": None,
            "eager_us": None,
            "launches": None,
            "least_bytes": case.least_bytes,
            "goal_us": case.goal_us if contender.name == OURS else None,
            "eager_goal_us": case.eager_goal_us if contender.name == OURS else None,
            "absent": None,
            "note": "",
        }
        if case.least_flops is not None:
            least, flops = contender.work or (case.least_bytes, case.least_flops)
            goal = case.goal_ratio if contender.name == OURS else None
            self.row |= {"least_bytes": least, "least_flops": flops, "goal_ratio": goal}
            self.row |= {"calls_per_graph": None, "peak_bytes": None}

    def note(self, sentence: str) -> None:
        """Adds a sentence to the row's note."""
        self.row["note"] = "; ".join(filter(None, (self.row["note"], sentence)))


Row = dict[str, Any]
Counted = tuple[Row, Callable[[], Any]]


def measure(case: Case, session: Session) -> tuple[list[Row], list[Counted]]:
    """One case: its rows, and (row, call) of those whose launches are to be counted.

    A contender that is absent, fails or disagrees keeps its row, without times, with the reason; the operator
    itself must work.
    """
    entries: list[_Entry] = []
    rows: list[Row] = []
    ours: tuple[Tensor, ...] = ()
    for found in case.build(session):
        if not is_ours(found.name) and found.name not in session.options.peers:
            continue
        if isinstance(found, Absent):
            entry = _Entry(Contender(found.name, tuple), case, session.options)
            entry.row["absent"] = found.reason
            rows.append(entry.row)
            continue
        entry = _Entry(found, case, session.options)
        rows.append(entry.row)
        try:
            answers = session.warm_up(found)
        except Exception as error:
            if found.name == OURS:
                raise
            entry.note(_line(error))
            continue
        if found.name == OURS:
            ours = answers
        elif found.comparable:
            gap = relative_error(answers, ours)
            entry.row["error"] = gap
            if not gap <= case.limit:
                entry.note(f"disagrees with {OURS} by {gap:.1e}, more than {case.limit:.0e}")
                continue
        entries.append(entry)
    contenders = {e.contender.name: e.contender for e in entries}
    runs = {name: c.run for name, c in contenders.items()}
    rounds, batch = session.options.rounds, session.options.batch_seconds
    if session.timer:
        rounds = _gpu_times(entries, session.timer, case.least_flops is not None)
    eager = wall(runs, session.device, rounds, batch, around=lambda name: contenders[name].applied())
    for entry in entries:
        entry.row["eager_us"] = asdict(eager[entry.contender.name])
    return rows, [(e.row, e.contender.call) for e in entries]


def ours(options: Options, session: Session) -> Iterator[tuple[Contender, Case]]:
    """The operator's own contenders, case by case; nothing is timed."""
    for case in importlib.import_module(f"fera_ext.bench.{options.operator}").cases(options):
        yield next(c for c in case.build(session) if isinstance(c, Contender) and c.name == OURS), case


def _captured(entries: Sequence[_Entry], timer: timing_cuda.GpuTimer, calls: Mapping[str, int]) -> dict[str, Any]:
    """Graphs of the contenders that a graph can hold; the others' rows say why not."""
    graphs = {}
    for entry in entries:
        name = entry.contender.name
        if not entry.contender.captures:
            entry.note("not capturable")
            continue
        try:
            graphs[name] = timer.capture(entry.contender.call, calls[name])
        except RuntimeError as error:
            entry.note(f"capture failed: {_line(error)}")
    return graphs


def _gpu_times(entries: list[_Entry], timer: timing_cuda.GpuTimer, long: bool) -> int:
    """Times of graphs into the rows, with ``long`` of planned ones, and peak memory; returns the rounds."""
    names = [entry.contender.name for entry in entries]
    each, cold_each = dict.fromkeys(names, timing_cuda.CALLS), dict.fromkeys(names, timing_cuda.COLD_CALLS)
    rounds = timer.rounds
    if long:
        for entry in entries:
            entry.row["peak_bytes"] = timer.peak_bytes(entry.contender.call)
        graphs = _captured(entries, timer, dict.fromkeys(names, 2))
        if not graphs:
            return rounds
        planned = timing_cuda.plan({n: t.median for n, t in timer.warm(graphs, 2, 2).items()}, rounds)
        each, cold_each, rounds = planned.warm, planned.cold, planned.rounds
        entries = [entry for entry in entries if entry.contender.name in graphs]
        graphs.clear()
    graphs = _captured(entries, timer, each)
    if not graphs:
        return rounds
    captured = {entry.contender.name: entry for entry in entries if entry.contender.name in graphs}
    warm = timer.warm(graphs, each, rounds)
    cold = timer.cold({name: entry.contender.call for name, entry in captured.items()}, cold_each, rounds)
    for name, entry in captured.items():
        entry.row["warm_us"], entry.row["cold_us"] = asdict(warm[name]), asdict(cold[name])
        if long:
            entry.row["calls_per_graph"] = each[name]
    return rounds


@contextmanager
def _settings() -> Iterator[None]:
    """float32 means float32 for every contender, and convolutions may choose their best algorithm."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = False, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
            yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def measure_all(options: Options, console: Any = None) -> dict[str, Any]:
    """Runs every case of the operator; the JSON-ready result.

    Keys: ``schema``, ``environment``, ``settings``, ``floor`` (None on a CPU), ``rows``, ``ok`` (False when a
    contender disagrees), ``stopped`` (Ctrl-C: what was measured until then stays), ``seconds``.
    """
    from fera_ext.bench.report import environment, finish_rows

    start = time.perf_counter()
    module = importlib.import_module(f"fera_ext.bench.{options.operator}")
    cases = list(module.cases(options))
    rows: list[Row] = []
    counted: list[Counted] = []
    stopped = False
    session = Session(options)
    floor: dict[str, Any] | None = None
    with _settings(), session.context():
        if session.timer:
            size, rate = session.timer.copy_rate()
            floor = {"copy_bytes": size, "copy_gb_s": rate, "empty_us": asdict(session.timer.empty())}
            if any(case.least_flops is not None for case in cases):
                floor["product_side"], floor["product_tflop_s"] = session.timer.product_rate(options.dtype)
        try:
            for case in _shown(cases, console):
                found, calls = measure(case, session)
                rows += found
                counted += calls
            if session.timer:
                counts = timing_cuda.launches([run for _, run in counted])
                for (row, _), count in zip(counted, counts):
                    row["launches"] = count
        except KeyboardInterrupt:
            stopped = True
    finish_rows(rows, floor)
    limit = max((case.limit for case in cases), default=LIMIT)
    linear = {"masters": options.masters} if options.experts else {}
    return {
        "schema": 1,
        "operator": options.operator,
        "environment": environment(options.device),
        "settings": {
            "dtype": str(options.dtype).removeprefix("torch."),
            "variant": options.variant,
            **linear,
            "calls_per_graph": timing_cuda.CALLS,
            "rounds": options.rounds,
            "peers": list(options.peers),
            "compile_seconds": session.compiler.spent,
            "error_limit": limit,
        },
        "floor": floor,
        "rows": rows,
        "ok": all(row["error"] is None or row["error"] <= limit for row in rows),
        "stopped": stopped,
        "seconds": time.perf_counter() - start,
    }


def _shown(cases: list[Case], console: Any) -> Iterator[Case]:
    """The cases, the one at work on the terminal's status line."""
    if console is None or not console.is_terminal:
        yield from cases
        return
    with console.status("") as status:
        for index, case in enumerate(cases, 1):
            status.update(
                f"{index} of {len(cases)}: {case.shape} {case.fields.get('experts', case.bands)} {case.pass_name}"
            )
            yield case
