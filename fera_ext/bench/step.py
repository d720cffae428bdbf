"""Whole training steps of real models, and sampling loops: `fera-ext bench step`.

A case is a model, a batch and an (E, r). Its contenders are attached to the same frozen model one after the other, so
that none is in memory while another is measured. A host's speed drifts: eager steps take turns with those of a frozen
model of their own, and the frozen model's eager forward and step are timed before and after the others.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fera_ext.bench import runner, step_measure
from fera_ext.bench.step_contenders import SAMPLERS, Absence, Trainee, attached, is_fera
from fera_ext.bench.step_models import CONFIGS, Batch, build, draw_batch
from fera_ext.bench.step_options import StepOptions, has_sampling
from fera_ext.bench.step_report import finish_rows
from fera_ext.bench.timing import synchronise

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""How far a contender's first loss may be from the frozen model's, whose predictions its own are while B is zero:
the mean over the whole prediction, so far less than the rounding of one number."""

FLOORS = ("forward", "frozen")
"""The frozen model's own."""

GIB = 2.0**30
Row = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class StepCase:
    """One row group of the table: ``pass_name`` is ``step`` or ``sampling``, ``batch`` is B."""

    pass_name: str
    model: str
    batch: int
    experts: tuple[int, int]

    @property
    def words(self) -> str:
        """The case in words."""
        return f"{self.model} B={self.batch} {self.experts[0]}x{self.experts[1]} {self.pass_name}"


def cases(options: StepOptions) -> Iterator[StepCase]:
    """All cases, one model after the other; a sampling loop makes one image."""
    for model in options.models:
        for batch in options.batches if "step" in options.passes else ():
            for experts in options.experts:
                yield StepCase("step", model, batch, experts)
        for experts in options.experts if "sampling" in options.passes and has_sampling(model) else ():
            yield StepCase("sampling", model, 1, experts)


def new_row(case: StepCase, name: str, mode: str, options: StepOptions) -> Row:
    """A row without times."""
    return {
        "pass": case.pass_name,
        "model": case.model,
        "batch": case.batch,
        "experts": f"{case.experts[0]}x{case.experts[1]}",
        "implementation": name,
        "mode": mode,
        "dtype": str(options.dtype).removeprefix("torch."),
        "ms": None,
        "ms_again": None,
        "frozen_beside_ms": None,
        "frozen_ratio": None,
        "peft_ratio": None,
        "peak_gib": None,
        "samples_per_s": None,
        "parameters": None,
        "loss": None,
        "finite": None,
        "error": None,
        "compile_seconds": None,
        "graph_breaks": None,
        "recompilations": None,
        "goal_frozen_ratio": None,
        "goal_peft_ratio": None,
        "goal_ms": None,
        "goal_peak_gib": None,
        "goals_met": None,
        "failed": False,
        "absent": None,
        "note": "",
    }


class Run:
    """The measuring of all cases; rows and failures collect as it goes.

    Args:
        options: the run's.
        keep: called after each contender.

    Attributes:
        rows: those measured so far, and those that could not be.
        failed: (case, error, traceback) of what is this library's fault, or the benchmark's.
        compile_seconds: what torch.compile has used.
    """

    def __init__(self, options: StepOptions, keep: Callable[[], None]) -> None:
        self.options = options
        self.keep = keep
        self.rows: list[Row] = []
        self.failed: list[dict[str, str]] = []
        self.timer = runner.gpu_timer(options)
        self.compile_seconds = 0.0
        self.compilations = 0
        self.start = time.perf_counter()
        self._model: tuple[str, nn.Module] | None = None
        self._twin: tuple[nn.Module, int] | None = (
            None  # a frozen model to be called in turns with contenders, its bytes
        )
        self._frozen: step_measure.Call | None = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start

    def model(self, name: str) -> nn.Module:
        """The frozen denoiser; the one before it is dropped."""
        if self._model is None or self._model[0] != name:
            self._model = self._twin = None
            step_measure.free(self.timer)
            self._model = (name, build(name, self.options.device, self.options.dtype))
        return self._model[1]

    def twin(self, name: str) -> nn.Module:
        """Another of the same; it stays as long as that, and no peak counts it."""
        if self._twin is None:
            before = self._allocated()
            twin = build(name, self.options.device, self.options.dtype)
            self._twin = (twin, self._allocated() - before)
        return self._twin[0]

    def _allocated(self) -> int:
        return 0 if self.timer is None else int(torch.cuda.memory_allocated(self.timer.device))

    @contextmanager
    def _beside(self, case: StepCase, names: Sequence[str], batch: Batch) -> Iterator[None]:
        """The frozen model's step stands ready for the eager steps of others."""
        steps = case.pass_name == "step" and "eager" in self.options.modes
        if not steps or set(names) <= set(FLOORS):
            yield
            return
        with attached("frozen", self.twin(case.model), batch, *case.experts) as trainee:
            self._frozen = step_measure.step_call("frozen", trainee, trainee.model)
            try:
                yield
            finally:
                self._frozen = None
                step_measure.without_gradients(trainee)

    def measure(self, case: StepCase, tell: Callable[[str], None]) -> None:
        """All contenders of a case; one that fails costs its own rows."""
        names = [n for n in self.options.contenders if case.pass_name == "step" or n in SAMPLERS]
        model = self.model(case.model)
        samples = case.batch if case.pass_name == "step" else 2 * case.batch  # guidance: without and with the text
        batch = draw_batch(case.model, samples, self.options.device, self.options.dtype)
        with torch.no_grad():
            frozen_loss = float(Trainee(model, batch, *case.experts).loss(model))
        with self._beside(case, names, batch):
            for name in names:
                tell(f"{case.words}: {name}")
                rows = [new_row(case, name, mode, self.options) for mode in self.options.modes]
                self.rows += rows
                if self._over():
                    self._absent(rows, f"the run's {self.options.budget:g} s were over (--budget)")
                    continue
                self._contender(case, name, model, batch, frozen_loss, rows)
                if runner.device_is_lost(self.options.device):
                    raise RuntimeError(f"the device is lost after {name}: {rows[0]['note'] or 'no error was seen'}")
                step_measure.free(self.timer)
                self.keep()
        self._again(case, model, batch)

    def _over(self) -> bool:
        return self.options.budget is not None and self.seconds > self.options.budget

    @staticmethod
    def _absent(rows: list[Row], why: str) -> None:
        for row in rows:
            row["absent"] = row["absent"] or why

    def _contender(
        self, case: StepCase, name: str, model: nn.Module, batch: Batch, frozen_loss: float, rows: list[Row]
    ) -> None:
        try:
            with attached(name, model, batch, *case.experts) as trainee:
                for row in rows:
                    row["parameters"] = sum(p.numel() for p in trainee.parameters)
                if name not in FLOORS:
                    self._check_first_loss(trainee, frozen_loss, rows)
                for row in rows:
                    try:
                        self._mode(case, trainee, row)
                    except Exception as error:
                        self._fail(case, [row], error)
                        if runner.device_is_lost(self.options.device):
                            break
                    step_measure.without_gradients(trainee)
                    step_measure.free(self.timer)
        except Absence as why:
            self._absent(rows, str(why))
        except Exception as error:
            self._fail(case, rows, error)

    def _fail(self, case: StepCase, rows: list[Row], error: Exception) -> None:
        """The reason into the rows; into the result too where it is no lack of memory and no rival's."""
        for row in rows:
            row["failed"], row["note"] = True, f"failed: {runner.reason(error)}"
        if is_fera(rows[0]["implementation"]) and not runner.out_of_memory(error):
            what = f"{case.words} {rows[0]['implementation']} {', '.join(row['mode'] for row in rows)}"
            self.failed.append(runner.crash(what, error))

    def _check_first_loss(self, trainee: Trainee, frozen_loss: float, rows: list[Row]) -> None:
        with torch.no_grad():
            first = float(F.mse_loss(trainee.predict(trainee.model).float(), trainee.batch.target))
        limit = LIMITS[self.options.dtype]
        for row in rows:
            row["error"] = abs(first - frozen_loss) / frozen_loss
            if not row["error"] <= limit:
                row["note"] = f"first loss {first:.6g}, the frozen model's {frozen_loss:.6g}"

    def _call(self, case: StepCase, name: str, trainee: Trainee, denoise: Any) -> step_measure.Call:
        if case.pass_name == "sampling":
            return step_measure.sampling_call(trainee, denoise, self.options.sampling_steps)
        return step_measure.step_call(name, trainee, denoise)

    def _mode(self, case: StepCase, trainee: Trainee, row: Row) -> None:
        """One mode's numbers into its row."""
        options, mode, name = self.options, row["mode"], row["implementation"]
        loop = case.pass_name == "sampling"
        rounds, warm_ups = (max(3, options.rounds // 3), 1) if loop else (options.rounds, step_measure.WARM_UPS)
        call = self._call(case, name, trainee, trainee.model)
        if mode == "graph":
            if not trainee.capturable:
                return self._absent([row], "no CUDA graph can hold it")
            if self.timer is None:
                return self._absent([row], "there is no GPU in use")
            taken = step_measure.graph(call, trainee, self.timer, rounds, warm_ups)
        elif mode == "compiled":
            why = self._no_compiling(trainee)
            if why:
                return self._absent([row], why)
            start = time.perf_counter()
            try:
                call = self._call(case, name, trainee, step_measure.compiled_model(trainee.model))
                taken, seconds = step_measure.compiled(call, options.device, self.timer, rounds, warm_ups)
                start = time.perf_counter() - seconds
            finally:
                self.compile_seconds += time.perf_counter() - start
                self.compilations += 1
                step_measure.forget_compiled()
        else:
            frozen = None if name in FLOORS else self._frozen
            taken = step_measure.eager(call, options.device, self.timer, rounds, warm_ups, frozen)
        self._fill(row, taken, case)
        return None

    def _no_compiling(self, trainee: Trainee) -> str:
        """Why a contender is not compiled; nothing if it is."""
        options = self.options
        if not trainee.compilable:
            return "it makes tensors on the CPU at each call"
        if self.compile_seconds >= options.compile_seconds:
            return f"torch.compile had used up its {options.compile_seconds:g} s (--compile-seconds)"
        each = self.compile_seconds / max(1, self.compilations)
        if options.budget is not None and self.seconds + each > options.budget:
            return f"torch.compile would not have ended within {options.budget:g} s (--budget)"
        return ""

    def _fill(self, row: Row, taken: step_measure.Taken, case: StepCase) -> None:
        row["ms"] = taken.milliseconds()
        row["samples_per_s"] = 1e3 * case.batch / row["ms"]["median"]
        beside = 0 if self._twin is None else self._twin[1]
        row["peak_gib"] = None if taken.peak_bytes is None else (taken.peak_bytes - beside) / GIB
        row["finite"] = bool(taken.answer.isfinite().all())
        row["loss"] = float(taken.answer) if taken.answer.numel() == 1 else None
        row |= taken.fields
        if not row["finite"]:
            row["note"] = "not finite"

    def _again(self, case: StepCase, model: nn.Module, batch: Batch) -> None:
        """The frozen model's eager calls once more, after all others."""
        mine = (case.pass_name, case.model, case.batch, f"{case.experts[0]}x{case.experts[1]}", "eager")
        keys = ("pass", "model", "batch", "experts", "mode")
        for row in self.rows:
            name = row["implementation"]
            if name not in FLOORS or tuple(row[k] for k in keys) != mine:
                continue
            if row["ms"] is None or self._over():
                continue
            rounds = 1 if case.pass_name == "sampling" else max(3, self.options.rounds // 2)
            with attached(name, model, batch, *case.experts) as trainee:
                call = self._call(case, name, trainee, model)
                taken = step_measure.eager(call, self.options.device, None, rounds, 1)
            row["ms_again"] = taken.milliseconds()["median"]


def _fine(row: Row, limit: float) -> bool:
    """Whether a row of this library's shows no mistake of it."""
    if not is_fera(row["implementation"]):
        return True
    agrees = row["error"] is None or row["error"] <= limit
    return agrees and row["finite"] is not False and not row["recompilations"]


@contextmanager
def _settings(options: StepOptions) -> Iterator[None]:
    """Quick collections of garbage, no warnings of what is meant to be, and the attention asked for."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"efficient": "EFFICIENT_ATTENTION", "flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
    chosen = [getattr(SDPBackend, names.get(name, name.upper())) for name in options.attention]
    with warnings.catch_warnings(), sdpa_kernel(chosen) if chosen else nullcontext():
        # An optimiser that a graph will hold says so when it runs outside of one.
        warnings.filterwarnings("ignore", message=".*capturable=True.*")
        gc.collect()
        gc.freeze()  # memory is given back many times, and the libraries' objects need no look each time
        try:
            yield
        finally:
            gc.unfreeze()


def measure_all(options: StepOptions, console: Any = None, keep: Callable[[Result], None] | None = None) -> Result:
    """Measures every case; the JSON-ready result, with the keys of :func:`fera_ext.bench.runner.measure_all`.

    cuDNN and TF32 stay as torch sets them: what a trainer has.

    Args:
        options: the run's.
        console: a rich console for the plan and the contender at work.
        keep: takes the result as it is after each contender.
    """
    from fera_ext.bench.report import environment

    planned = list(cases(options))
    where = environment(options.device)
    limit = LIMITS[options.dtype]

    def result(stopped: bool = False) -> Result:
        finish_rows(run.rows)
        return {
            "schema": 1,
            "operator": "step",
            "environment": where,
            "settings": settings(options, run.compile_seconds),
            "floor": None,
            "rows": run.rows,
            "failed": run.failed,
            "ok": not run.failed and all(_fine(row, limit) for row in run.rows),
            "stopped": stopped,
            "cases": len(planned),
            "seconds": run.seconds,
        }

    run = Run(options, lambda: keep(result()) if keep else None)
    if console is not None:
        console.print(f"step: {len(planned)} cases of up to {len(options.contenders)} contenders")
    stream = run.timer.stream_context() if run.timer else nullcontext()
    with _settings(options), stream, runner.status(console) as tell:
        if run.timer:
            run.timer.touch()
        try:
            for case in planned:
                try:
                    run.measure(case, tell)
                except Exception as error:
                    run.failed.append(runner.crash(case.words, error))
                    if runner.device_is_lost(options.device):
                        return result()
                    step_measure.free(run.timer)
                if keep:
                    keep(result())
        except KeyboardInterrupt:
            return result(stopped=True)
        synchronise(options.device)
    return result()


def settings(options: StepOptions, compile_seconds: float) -> dict[str, Any]:
    """What the result says of how it was measured."""
    import os

    return {
        "dtype": str(options.dtype).removeprefix("torch."),
        "variant": os.environ.get("FERA_EXPERT_VARIANT") or "auto",
        "modes": list(options.modes),
        "contenders": list(options.contenders),
        "attention": list(options.attention),
        "rounds": options.rounds,
        "learning_rate": step_measure.LEARNING_RATE,
        "clip": step_measure.CLIP,
        "sampling_steps": options.sampling_steps,
        "guidance": step_measure.GUIDANCE,
        "configs": {name: CONFIGS[name] for name in options.models},
        "compile_seconds": compile_seconds,
        "budget": options.budget,
        "error_limit": LIMITS[options.dtype],
    }
