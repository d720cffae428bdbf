"""What `fera-ext bench` does where memory, time, a capture or a case gives out."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bench import FakeCuda, bench, fake_cuda_fixture, no_variant, options  # noqa: F401 - fixtures

from fera_ext import ops
from fera_ext.bench import expert_linear, peers_expert, peers_torch, runner, shapes, timing, timing_cuda

TINY = ["--shapes", "2x4x24x40", "--rounds", "3"]
GROUP = ["expert_linear", "--shapes", "2x5x24x40:3", "--rounds", "3", "--experts", "3x4", "--dtype", "float32"]


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def row_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in found["rows"] if r["implementation"] == name)


def test_graphs_of_a_case_share_memory(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool a round of captures, every graph gone before the next pool, the cached flushes in pools of their own."""
    monkeypatch.setattr(timing_cuda, "launches", lambda runs: [2 for _ in runs])
    shared: list[tuple[int, int]] = []  # (handle, graphs alive when it was made)
    handle = torch.cuda.graph_pool_handle

    def counting() -> Any:
        shared.append((found := handle(), len(FakeCuda.CUDAGraph.alive) - len(session[0].timer._flushes)))
        return found

    session: list[Any] = []
    make = runner.Session.__init__

    def remember(self: Any, given: Any) -> None:
        make(self, given)
        session.append(self)

    monkeypatch.setattr(runner.Session, "__init__", remember)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", counting)
    found = runner.measure_all(options("expert_linear", experts="3x4,2x5", peers="frozen,torch,published"))
    assert found["ok"]
    pools = FakeCuda.CUDAGraph.pools
    flushes, empty = len(session[0].timer._flushes), 1
    # Of each case: choosing the form, rough times, warm and cold times.
    assert len(set(pools)) == 3 * found["cases"] + flushes + empty
    assert len(FakeCuda.CUDAGraph.alive) == flushes
    alone = [pool for pool in set(pools) if pools.count(pool) == 1]
    assert len(alone) == flushes + empty
    assert all(alive == 0 for pool, alive in shared if pool not in alone)


def test_an_empty_graph_is_an_error(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(self: Any) -> None:
        warnings.warn("The CUDA Graph is empty. This usually means", UserWarning, stacklevel=1)

    timer = timing_cuda.GpuTimer(torch.device("cpu"), 3)
    monkeypatch.setattr(FakeCuda.CUDAGraph, "capture_end", empty)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="got an empty graph"):
            timer.capture(lambda: None)

        def broken() -> None:
            raise RuntimeError("not capturable")

        with pytest.raises(RuntimeError, match="not capturable"):
            timer.capture(broken)
    assert not caught  # a failed capture's own empty graph says nothing
    assert not FakeCuda.CUDAGraph.alive


def test_a_failed_capture_leaves_no_pool_behind(fake_cuda: None) -> None:
    timer = timing_cuda.GpuTimer(torch.device("cpu"), 3)
    with timer.shared_memory():
        kept = timer.capture(lambda: None, 1)
        with pytest.raises(torch.OutOfMemoryError):
            timer.capture(no_memory)
        again = timer.capture(lambda: None, 1)
    first, failed, second = FakeCuda.CUDAGraph.pools
    assert first == failed != second
    assert FakeCuda.CUDAGraph.alive == {id(kept), id(again)}
    assert timer._pool is None


@pytest.mark.parametrize("where", ["warm up", "peak", "capture", "cold", "eager"])
def test_a_contender_without_memory_is_a_note(where: str, fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cuda, "launches", lambda runs: [2 for _ in runs])
    capture, state = timing_cuda.GpuTimer.capture, {"on": where == "warm up"}
    published = peers_expert.published_linear

    def picky(*arguments: Any) -> Any:
        return no_memory() if state["on"] else published(*arguments)

    def around(at: str, function: Any) -> Any:
        def inside(*arguments: Any, **more: Any) -> Any:
            cold = len(arguments) > 3 and arguments[3] is not None
            state["on"] = at == where or (where == "cold" and at == "capture" and cold)
            try:
                return function(*arguments, **more)
            finally:
                state["on"] = where == "warm up"

        return inside

    monkeypatch.setattr(peers_expert, "published_linear", picky)
    monkeypatch.setattr(timing_cuda.GpuTimer, "capture", around("capture", capture))
    monkeypatch.setattr(timing_cuda.GpuTimer, "peak_bytes", around("peak", timing_cuda.GpuTimer.peak_bytes))
    monkeypatch.setattr(runner, "wall", around("eager", timing.wall))
    found = runner.measure_all(options("expert_linear", experts="3x4", peers="frozen,published", passes="step"))
    row = row_of(found, "published")
    assert "out of memory" in row["note"]
    assert found["ok"]
    assert not found["failed"]
    assert (row["warm_us"] is None) == (where in ("warm up", "capture"))
    assert (row["cold_us"] is None) == (where in ("warm up", "capture", "cold"))
    assert (row["eager_us"] is None) == (where in ("warm up", "eager"))
    for name in ("fera_ext", "frozen"):
        assert row_of(found, name)["cold_us"]
        assert row_of(found, name)["eager_us"]


def test_the_operator_without_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "expert_linear", no_memory)
    found = runner.measure_all(options("expert_linear", experts="3x4", peers="frozen,torch", passes="step"))
    assert row_of(found, "fera_ext")["note"] == "out of memory"
    assert row_of(found, "torch")["note"] == "not compared: fera_ext has no answers"
    assert row_of(found, "torch")["eager_us"]
    assert not found["failed"]


def crash_at(monkeypatch: pytest.MonkeyPatch, bands: str) -> None:
    measure = runner.measure

    def picky(case: Any, session: Any) -> Any:
        if case.bands == bands:
            raise RuntimeError("an illegal memory access\nwas met")
        return measure(case, session)

    monkeypatch.setattr(runner, "measure", picky)


def test_a_crash_costs_its_case_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crash_at(monkeypatch, "rings(3)")
    path = tmp_path / "a.json"
    result = bench("band_energy", *TINY, "--bands", "dog,rings,custom", "--passes", "forward", "--json", str(path))
    assert result.exit_code == 1
    assert "failed: 2x4x24x40 rings(3) forward: RuntimeError: an illegal memory access" in result.output
    found = json.loads(path.read_text())
    assert {r["bands"] for r in found["rows"]} == {"dog(3)", "custom(3)"}
    assert "in picky" in found["failed"][0]["traceback"]
    assert not found["ok"]


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: Any) -> None:
        raise RuntimeError("an illegal memory access")

    crash_at(monkeypatch, "rings(3)")
    monkeypatch.setattr(runner, "device_is_lost", lambda device: True)
    found = runner.measure_all(options(bands="dog,rings,custom", passes="forward"))
    assert {r["bands"] for r in found["rows"]} == {"dog(3)"}
    assert len(found["failed"]) == 1
    monkeypatch.undo()
    monkeypatch.setattr(runner, "synchronise", lost)
    assert runner.device_is_lost(torch.device("cpu"))


def test_rows_are_kept_after_each_case(tmp_path: Path) -> None:
    seen: list[int] = []
    found = runner.measure_all(options(bands="dog,rings", passes="forward"), keep=lambda r: seen.append(len(r["rows"])))
    assert len(seen) == found["cases"] == 2
    assert 0 < seen[0] < seen[1] == len(found["rows"])


def test_launches_that_cannot_be_counted(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cuda, "launches", no_memory)
    found = runner.measure_all(options(bands="dog", passes="forward", peers="none"))
    assert [(c["case"], c["error"]) for c in found["failed"]] == [("counting launches", "out of memory")]
    assert row_of(found, "fera_ext")["warm_us"]


def test_a_run_that_raises_has_no_time() -> None:
    def second() -> None:
        calls.append(1)
        if len(calls) > 6:
            no_memory()

    calls: list[int] = []
    failed: dict[str, Exception] = {}
    runs = {"a": lambda: None, "b": no_memory, "c": second}
    times = timing.wall(runs, torch.device("cpu"), 3, 0.0, failed=failed)
    assert set(times) == {"a"}
    assert set(failed) == {"b", "c"}
    assert times["a"].samples == 3
    with pytest.raises(torch.OutOfMemoryError):
        timing.wall(runs, torch.device("cpu"), 3, 0.0)


def test_room() -> None:
    """Ten cases of 2 s beside 8 s of compiling: four are to come and grow by the rest's factor."""
    assert runner.room(100.0, 20.0, 8.0, 6, 10) == pytest.approx(80 - runner.REST * 2 * 4)
    assert runner.room(100.0, 5.0, 0.0, 0, 10) == 95.0


def test_a_budget_drops_the_compiler_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    relative_error = runner.relative_error
    compiler = peers_torch.Compiler(float("inf"), 60.0)
    assert compiler(("a",), "step", relative_error) is not None
    compiler.timed(lambda: time.sleep(0.02))
    compiler.room = 0.01
    assert compiler(("b",), "step", relative_error) is None
    assert compiler.refusal == "torch.compile would not have ended within 60 s (--budget)"
    assert compiler(("a",), "step", relative_error) is not None  # made already
    compiler.room = 1.0
    assert compiler(("b",), "step", relative_error) is not None
    given = options("fecl_loss", bands="dog,author", peers="compiled", budget=0.0)
    assert given.compile_seconds == float("inf")
    found = runner.measure_all(given)
    reasons = {r["absent"] for r in found["rows"] if r["implementation"] == "compiled"}
    assert reasons == {"torch.compile would not have ended within 0 s (--budget)"}
    assert found["settings"]["budget"] == 0.0
    assert options().compile_seconds == 45.0
    assert options(budget=10.0, compile_seconds=3.0).compile_seconds == 3.0


def test_the_plan_is_told() -> None:
    result = bench("band_energy", *TINY, "--bands", "dog,rings", "--peers", "torch")
    assert result.output.startswith("band_energy: 4 cases, 1 shapes\n")
    given = options("expert_linear", peers="compiled", budget=300.0)
    listed = list(expert_linear.cases(given))
    words = runner.plan_words(given, listed)
    assert words.endswith(
        "6 cases, 1 shapes; torch.compile may take all it needs, less where the run would take over 300 s"
    )


def test_a_log_is_as_wide_as_its_tables(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piped, whatever COLUMNS says: every row on a line of its own but for a folded note."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(timing_cuda, "launches", lambda runs: [2 for _ in runs])
    monkeypatch.setitem(shapes.LINEAR_GOALS, (2, 5, 24, 40, 3), {12: 1e6})
    result = bench(*GROUP, "--dtype", "bfloat16", "--peers", "frozen,torch")
    assert result.exit_code == 0, result.output
    assert "\x1b[" not in result.output
    assert "…" not in result.output
    assert any(" frozen " in line and " no adapter " in line for line in result.output.splitlines())
    assert "≤ 1e+06 × frozen met" in result.output


def test_touch_reaches_autograds_thread(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    graded: list[Any] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: graded.append(grad(*given)) or graded[-1])
    timing_cuda.GpuTimer(torch.device("cpu"), 3).touch()
    assert len(graded) == 1


@pytest.mark.parametrize("grouped", [False, True])
def test_a_group_of_linears(grouped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every contender of a group agrees, output by output and gradient by gradient."""
    monkeypatch.delattr(ops, "expert_linear_group", raising=False)
    taken: list[int] = []

    def group(x: Any, weights: Any, biases: Any, lora_as: Any, lora_bs: Any, gate: Any, scale: float) -> Any:
        assert biases == [None] * len(weights)
        taken.append(len(weights))
        return [ops.expert_linear(x, w, None, a, b, gate, scale) for w, a, b in zip(weights, lora_as, lora_bs)]

    if grouped:
        monkeypatch.setattr(ops, "expert_linear_group", group, raising=False)
    path = tmp_path / "a.json"
    result = bench(*GROUP, "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "(10 tokens, 24→40, 2 gate rows, 3 linears) float32" in result.output
    found = json.loads(path.read_text())
    assert {row["shape"] for row in found["rows"]} == {"2x5x24x40:3"}
    for row in found["rows"]:
        assert row["linears"] == 3
        if row["implementation"].startswith("fera_ext"):
            assert row["form"] == ("expert_linear_group" if grouped else "3 calls of expert_linear")
        if row["implementation"] in ("torch", "published"):
            assert row["error"] <= 1e-5
    assert set(taken) == ({3} if grouped else set())


@pytest.mark.parametrize("form", list(peers_expert.GROUP_FORMS))
def test_group_forms(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form alone, eager and compiled in one graph; the published pattern's gradients come in the same order."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="eager", **how))
    monkeypatch.setattr(runner.Session, "fastest", lambda self, key, contenders: form)
    given = options("expert_linear", dtype="float32", experts="3x4", peers="torch,compiled,published")
    object.__setattr__(given, "shapes", ((2, 5, 24, 40, 2),))
    found = runner.measure_all(given)
    assert not found["failed"]
    rows = [r for r in found["rows"] if not r["implementation"].startswith("fera_ext")]
    assert [r["implementation"] for r in rows] == ["torch", "compiled", "published"] * 2
    assert not [r["note"] for r in rows if r["note"]]
    assert all(r["error"] <= 1e-5 for r in rows)


def test_group_work() -> None:
    """Of three linears all is threefold but reading x, and in the backward reading x and writing dx."""
    one, three = (2, 3, 4, 5), (2, 3, 4, 5, 3)
    for pass_name, times in (("forward", 1), ("step", 3)):
        least, flops = expert_linear.work(pass_name, one, 3, 2)
        shared = times * 24 * 2
        assert expert_linear.work(pass_name, three, 3, 2) == (shared + 3 * (least - shared), 3 * flops)


def test_peft_in_a_group() -> None:
    pytest.importorskip("peft", reason="needs peft")
    session = runner.Session(options("expert_linear", dtype="float32", passes="step"))
    layer = expert_linear.layer(session, (2, 5, 24, 40, 3), 3, 4)
    contender = peers_expert.peft_lora(session, layer, "step")
    assert [tuple(t.shape) for t in contender.call()] == [(2, 5, 40)] * 3 + [(2, 5, 24)] + [(12, 24), (40, 12)] * 3
