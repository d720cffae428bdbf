"""Runs the cases: builds, checks, captures, times in turns, and collects rows."""

from __future__ import annotations

import importlib
import math
import time
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fera_ext.bench import timing_cuda
from fera_ext.bench.cases import LIMIT, OURS, Absent, Case, Contender, Options, is_ours
from fera_ext.bench.peers_torch import Compiler
from fera_ext.bench.timing import Spread, synchronise, wall

Made = TypeVar("Made")


class Timed(Protocol):
    """Options with a device and a number of samples."""

    @property
    def device(self) -> torch.device: ...
    @property
    def rounds(self) -> int: ...


def gpu_timer(options: Timed) -> timing_cuda.GpuTimer | None:
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
        self.compiler = Compiler(options.compile_seconds, options.budget)
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
            times = self._times({name: c.run for name, c in contenders.items()})
            # Where none has a time, each says why when it is warmed up.
            self._picked[key] = min(times, key=lambda name: times[name].median, default=next(iter(contenders)))
        return self._picked[key]

    def _times(self, runs: Mapping[str, Callable[[], Any]]) -> Mapping[str, Spread]:
        failed: dict[str, Exception] = {}
        times = wall(runs, self.device, rounds=3, batch_seconds=0.0, failed=failed)
        if not self.timer or not times:
            return times
        try:
            with self.timer.shared_memory():
                return self._graph_times({name: runs[name] for name in times}, self.timer)
        except RuntimeError:  # what cannot be captured is compared by wall time
            return times

    @staticmethod
    def _graph_times(runs: Mapping[str, Callable[[], Any]], timer: timing_cuda.GpuTimer) -> Mapping[str, Spread]:
        return timer.warm({name: timer.capture(run, 5) for name, run in runs.items()}, 5)

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


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, CuPy or a library of theirs found no memory."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error)


def reason(error: BaseException) -> str:
    """An error in one line."""
    if out_of_memory(error):
        return "out of memory"
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

    A contender that is absent, fails, disagrees or finds no memory keeps its row, without times, with the reason;
    the operator itself may only lack memory.
    """
    entries: list[_Entry] = []
    rows: list[Row] = []
    ours: tuple[Tensor, ...] | None = None
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
            if found.name == OURS and not out_of_memory(error):
                raise
            entry.note(reason(error))
            continue
        if found.name == OURS:
            ours = answers
        elif found.comparable and ours is None:
            entry.note(f"not compared: {OURS} has no answers")
        elif found.comparable and ours is not None:
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
    failed: dict[str, Exception] = {}
    eager = wall(runs, session.device, rounds, batch, lambda name: contenders[name].applied(), failed)
    for entry in entries:
        name = entry.contender.name
        if name not in failed:
            entry.row["eager_us"] = asdict(eager[name])
        elif name == OURS and not out_of_memory(failed[name]):
            raise failed[name]
        else:
            entry.note(f"eager: {reason(failed[name])}")
    return rows, [(e.row, e.contender.call) for e in entries if e.contender.name not in failed]


def ours(options: Options, session: Session) -> Iterator[tuple[Contender, Case]]:
    """The operator's own contenders, case by case; nothing is timed."""
    for case in importlib.import_module(f"fera_ext.bench.{options.operator}").cases(options):
        yield next(c for c in case.build(session) if isinstance(c, Contender) and c.name == OURS), case


def _captured(
    entries: Sequence[_Entry],
    timer: timing_cuda.GpuTimer,
    calls: Mapping[str, int],
    before: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Graphs of the contenders that a graph can hold; the others' rows say why not."""
    graphs = {}
    for entry in entries:
        name = entry.contender.name
        if not entry.contender.captures:
            entry.note("not capturable")
            continue
        try:
            graphs[name] = timer.capture(entry.contender.call, calls[name], before)
        except RuntimeError as error:
            entry.note(f"capture failed: {reason(error)}")
    return graphs


def _gpu_times(entries: list[_Entry], timer: timing_cuda.GpuTimer, long: bool) -> int:
    """Times of graphs into the rows, with ``long`` of planned ones, and peak memory; returns the rounds."""
    names = [entry.contender.name for entry in entries]
    planned = timing_cuda.Plan(
        dict.fromkeys(names, timing_cuda.CALLS), dict.fromkeys(names, timing_cuda.COLD_CALLS), timer.rounds
    )
    if long:
        for entry in entries:
            try:
                entry.row["peak_bytes"] = timer.peak_bytes(entry.contender.call)
            except RuntimeError as error:
                entry.note(f"peak memory: {reason(error)}")
        with timer.shared_memory():
            rough = _rough(entries, timer)
        planned = timing_cuda.plan(rough, timer.rounds)
        entries = [entry for entry in entries if entry.contender.name in rough]
    with timer.shared_memory():
        _fill(entries, timer, planned, long)
    return planned.rounds


def _rough(entries: Sequence[_Entry], timer: timing_cuda.GpuTimer) -> dict[str, float]:
    """About how many microseconds a call takes, of those that can be captured."""
    graphs = _captured(entries, timer, dict.fromkeys([entry.contender.name for entry in entries], 2))
    return {name: time.median for name, time in timer.warm(graphs, 2, 2).items()}


def _fill(entries: Sequence[_Entry], timer: timing_cuda.GpuTimer, planned: timing_cuda.Plan, long: bool) -> None:
    """Warm and cold times into the rows; the graphs are gone afterwards."""
    graphs = _captured(entries, timer, planned.warm)
    entries = [entry for entry in entries if entry.contender.name in graphs]
    flushed = _captured(entries, timer, planned.cold, timer.flush)
    warm = timer.warm(graphs, planned.warm, planned.rounds)
    cold = timer.cold(flushed, planned.cold, planned.rounds)
    for entry in entries:
        name = entry.contender.name
        entry.row["warm_us"] = asdict(warm[name])
        entry.row["cold_us"] = asdict(cold[name]) if name in cold else None
        if name in flushed and name not in cold:
            entry.note("no cold time: not positive beside the flushes, is the GPU shared?")
        if long:
            entry.row["calls_per_graph"] = planned.warm[name]


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


Result = dict[str, Any]


def measure_all(options: Options, console: Any = None, keep: Callable[[Result], None] | None = None) -> Result:
    """Runs every case of the operator; the JSON-ready result.

    A case that crashes costs its own rows alone; the run goes on with the next while the device still answers.

    Keys: ``schema``, ``environment``, ``settings``, ``floor`` (None on a CPU), ``rows``, ``failed`` (case, error
    and traceback of what crashed), ``ok`` (False when a contender disagrees or something crashed), ``stopped``
    (Ctrl-C: what was measured until then stays), ``cases`` (how many there are), ``seconds``.

    Args:
        options: the run's.
        console: a rich console for the plan and the case at work.
        keep: takes the result as it is after each case, so that nothing is lost with the process.
    """
    from fera_ext.bench.report import environment, finish_rows

    start = time.perf_counter()
    module = importlib.import_module(f"fera_ext.bench.{options.operator}")
    cases = list(module.cases(options))
    rows: list[Row] = []
    counted: list[Counted] = []
    failed: list[dict[str, str]] = []
    session = Session(options)
    where = environment(options.device)
    limit = max((case.limit for case in cases), default=LIMIT)
    linear = {"masters": options.masters} if options.experts else {}
    floor: dict[str, Any] | None = None

    def result(stopped: bool = False) -> Result:
        finish_rows(rows, floor)
        return {
            "schema": 1,
            "operator": options.operator,
            "environment": where,
            "settings": {
                "dtype": str(options.dtype).removeprefix("torch."),
                "variant": options.variant,
                **linear,
                "calls_per_graph": timing_cuda.CALLS,
                "rounds": options.rounds,
                "peers": list(options.peers),
                "compile_seconds": session.compiler.spent,
                "budget": options.budget,
                "error_limit": limit,
            },
            "floor": floor,
            "rows": rows,
            "failed": failed,
            "ok": not failed and all(row["error"] is None or row["error"] <= limit for row in rows),
            "stopped": stopped,
            "cases": len(cases),
            "seconds": time.perf_counter() - start,
        }

    if console is not None:
        console.print(plan_words(options, cases))
    with _settings(), session.context():
        if session.timer:
            session.timer.touch()
            size, rate = session.timer.copy_rate()
            floor = {"copy_bytes": size, "copy_gb_s": rate, "empty_us": asdict(session.timer.empty())}
            if any(case.least_flops is not None for case in cases):
                floor["product_side"], floor["product_tflop_s"] = session.timer.product_rate(options.dtype)
        try:
            for done, case in enumerate(_shown(cases, console)):
                if options.budget is not None:
                    spent = time.perf_counter() - start
                    session.compiler.room = room(options.budget, spent, session.compiler.spent, done, len(cases))
                try:
                    found, calls = measure(case, session)
                    rows += found
                    counted += calls
                except Exception as error:
                    failed.append(crash(case_words(case), error))
                if keep:
                    keep(result())
                if failed and device_is_lost(session.device):
                    break
            if session.timer:
                _count_launches(counted, failed)
        except KeyboardInterrupt:
            return result(stopped=True)
    return result()


REST = 1.15
"""What the cases' seconds grow by in the end: launches are counted after the last."""


def room(budget: float, spent: float, compiled: float, done: int, cases: int) -> float:
    """Seconds of the budget left for compiling, when each case to come takes what those done took in the mean.

    Args:
        budget, spent: of the whole run, seconds.
        compiled: seconds of ``spent`` that went to torch.compile.
        done, cases: how many cases there were, and are in all.
    """
    each = (spent - compiled) / done if done else 0.0
    return budget - spent - REST * each * (cases - done)


def plan_words(options: Options, cases: Sequence[Case]) -> str:
    """How much there is to do."""
    words = f"{options.operator}: {len(cases)} cases, {len(options.shapes)} shapes"
    if "compiled" not in options.peers:
        return words
    limit = f"up to {options.compile_seconds:g} s" if math.isfinite(options.compile_seconds) else "all it needs"
    within = "" if options.budget is None else f", less where the run would take over {options.budget:g} s"
    return f"{words}; torch.compile may take {limit}{within}"


def case_words(case: Case) -> str:
    """A case by its shape, setting and pass."""
    return f"{case.shape} {case.fields.get('experts', case.bands)} {case.pass_name}"


def crash(what: str, error: Exception) -> dict[str, str]:
    """An entry of a result's ``failed``."""
    return {"case": what, "error": reason(error), "traceback": "".join(traceback.format_exception(error))}


def device_is_lost(device: torch.device) -> bool:
    """Whether an error has left the device unusable."""
    try:
        synchronise(device)
    except Exception:
        return True
    return False


def _count_launches(counted: Sequence[Counted], failed: list[dict[str, str]]) -> None:
    """Launches into the rows; where they cannot be counted the rows keep their times."""
    try:
        counts = timing_cuda.launches([run for _, run in counted])
    except Exception as error:
        failed.append(crash("counting launches", error))
        return
    for (row, _), count in zip(counted, counts):
        row["launches"] = count


@contextmanager
def status(console: Any) -> Iterator[Callable[[str], None]]:
    """A function that shows a sentence on the terminal's status line; nothing where there is no terminal."""
    if console is None or not console.is_terminal:
        yield lambda words: None
        return
    with console.status("") as line:
        yield line.update


def _shown(cases: list[Case], console: Any) -> Iterator[Case]:
    """The cases, the one at work on the terminal's status line."""
    with status(console) as tell:
        for index, case in enumerate(cases, 1):
            tell(f"{index} of {len(cases)}: {case_words(case)}")
            yield case
