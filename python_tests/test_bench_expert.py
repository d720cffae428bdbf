"""`fera-ext bench expert_linear` on the CPU, and its GPU columns on a fake of torch.cuda."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bench import FakeCuda, bench, fake_cuda_fixture, no_variant, options  # noqa: F401 - fixtures
from typer.testing import CliRunner

from fera_ext import ops, reference
from fera_ext.bench import (
    cases,
    expert_linear,
    peers_expert,
    report,
    runner,
    shapes,
    timing_cuda,
    variants,
)
from fera_ext.cli import app

LINEAR = ["expert_linear", "--shapes", "2x5x24x40,6x16x8", "--rounds", "3", "--experts", "3x4,2x5"]


def test_linear_files_and_agreement(tmp_path: Path) -> None:
    """Every comparable contender in float32, forward and all gradients."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    paths = [str(tmp_path / name) for name in ("a.json", "a.csv", "a.svg")]
    files = [word for pair in zip(("--json", "--csv", "--plot"), paths) for word in pair]
    result = bench(*LINEAR, "--dtype", "float32", *files)
    assert result.exit_code == 0, result.output
    assert "(10 tokens, 24→40, 2 gate rows) float32" in result.output
    found = json.loads(Path(paths[0]).read_text())
    assert found["settings"]["variant"] == "all"
    by = {(r["shape"], r["experts"], r["pass"], r["implementation"]): r for r in found["rows"]}
    assert len(by) == len(found["rows"]) == 2 * 2 * 2 * (4 + len(variants("expert_linear")[1][1:]))
    for (shape, experts, pass_name, name), row in by.items():
        if row["note"]:  # a forced variant that the CPU or the shape does not have
            assert name.startswith("fera_ext:")
            continue
        if name in ("frozen", "peft", "fera_ext"):
            assert row["error"] is None
        else:
            assert row["error"] <= 1e-5
        if row["absent"]:
            assert name == "peft"
            continue
        assert row["eager_us"]["samples"] == 3
        assert row["warm_us"] is row["peak_bytes"] is row["tflop_s"] is row["frozen_ratio"] is row["goal_us"] is None
        floor = by[shape, experts, pass_name, "frozen"]
        assert row["eager_frozen_ratio"] == row["eager_us"]["median"] / floor["eager_us"]["median"]
        assert row["least_flops"] > floor["least_flops"] or name == "frozen"
    with open(paths[1], newline="") as file:
        assert len(list(csv.DictReader(file))) == len(by)
    assert "</svg>" in Path(paths[2]).read_text()
    assert os.environ["FERA_EXPERT_VARIANT"] == ""


def test_linear_gpu_columns(fake_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cuda, "launches", lambda runs: [2 for _ in runs])
    monkeypatch.setitem(shapes.LINEAR_GOALS, (2, 5, 24, 40), {12: 1e6})
    path = tmp_path / "a.json"
    result = bench(*LINEAR, "--json", str(path))
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    floor = found["floor"]
    assert floor["product_side"] == 512
    for row in found["rows"]:
        if row["absent"] or row["note"]:  # a forced variant that the CPU does not have
            continue
        assert row["launches"] == 2
        assert row["peak_bytes"] == 2 << 20
        assert 2 <= row["calls_per_graph"] <= 50
        assert row["tflop_s"] == pytest.approx(row["least_flops"] / row["warm_us"]["median"] / 1e6)
        moved, computed = row["least_bytes"] / floor["copy_gb_s"] / 1e3, row["least_flops"] / floor["product_tflop_s"]
        assert row["floor_us"] == pytest.approx(max(moved, computed / 1e6))
        assert row["frozen_ratio"] > 0
        goal = (row["shape"], row["experts"], row["pass"], row["implementation"])
        assert (row["goal_ratio"] is not None) == (goal == ("2x5x24x40", "3x4", "step", "fera_ext"))
        assert (row["goal_us"] is not None) == (row["goal_ratio"] is not None)
    flat = " ".join(result.output.split())
    for words in ("≤ 1e+06 × frozen", "met", "TFLOP/s", "peak", "product of side 512"):
        assert words in flat
    if pytest.importorskip("matplotlib", reason="needs matplotlib"):
        report.draw(found, tmp_path / "a.svg")


def test_linear_goals_and_lists() -> None:
    assert set(shapes.LINEAR_GOALS) < set(shapes.LINEARS) < set(shapes.ALL_LINEARS)
    assert len(set(shapes.ALL_LINEARS)) == len(shapes.ALL_LINEARS)
    assert shapes.parse_linears("16384x320x320,4x4096x320x320,9x8x7") == ((4, 4096, 320, 320), (1, 9, 8, 7))
    assert shapes.parse_linears("16384x640x640:3,4x4096x640x640:3") == ((4, 4096, 640, 640, 3),)
    assert shapes.parse_linears("9x8x7:2,9x8x7:1") == ((1, 9, 8, 7, 2), (1, 9, 8, 7))
    for shape in shapes.ALL_LINEARS:
        assert shapes.parse_linears(shapes.linear_name(shape)) == (shape,)
    quick = cases.Options.parse("expert_linear", device="cpu", quick=True)
    assert (quick.shapes, quick.experts) == (shapes.QUICK_LINEARS, ((3, 4), (4, 32)))
    assert (quick.dtype, quick.variant) == (torch.bfloat16, "all")
    listed = list(expert_linear.cases(cases.Options.parse("expert_linear", device="cpu")))
    assert [c.goal_ratio for c in listed if c.goal_ratio] == [
        g[r] for r in (12, 128) for g in shapes.LINEAR_GOALS.values()
    ]


def test_linear_work() -> None:
    """2·T·in·out a product; the adapters add R columns; T = 6, in 4, out 5, R 3, 2 bytes."""
    shape = (2, 3, 4, 5)
    assert expert_linear.work("forward", shape, 3, 2) == (2 * (24 + 20 + 30 + 18), 2 * 6 * 20 + 2 * 6 * 3 * 9)
    step = expert_linear.work("step", shape, 3, 2)
    assert step == (2 * (24 + 20 + 30 + 18 + 30 + 20 + 48 + 18), 4 * 6 * 20 + 6 * 6 * 3 * 9)
    assert expert_linear.work("step", shape, 0, 2) == (2 * (24 + 20 + 30 + 30 + 20 + 24), 4 * 6 * 20)


def test_plan() -> None:
    small = timing_cuda.plan({"a": 20.0, "b": 500.0}, 20)
    assert (small.warm, small.cold) == ({"a": 50, "b": 20}, {"a": 10, "b": 10})
    large = timing_cuda.plan(dict.fromkeys("abcdefgh", 9000.0), 20)
    assert (set(large.warm.values()), set(large.cold.values()), large.rounds) == ({2}, {2}, 5)
    assert timing_cuda.plan({"a": 1.0}, 20).rounds == 20


def test_a_variant_that_fails_keeps_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, seen = ops.expert_linear, set()

    def picky(*arguments: Any) -> torch.Tensor:
        seen.add(os.environ["FERA_EXPERT_VARIANT"])
        if os.environ["FERA_EXPERT_VARIANT"] == "tiles":
            raise RuntimeError("expert_linear: no such tiles")
        return operator(*arguments)

    monkeypatch.setattr(ops, "expert_linear", picky)
    monkeypatch.delenv("FERA_EXPERT_VARIANT")
    found = runner.measure_all(options("expert_linear", peers="none", experts="3x4", passes="step"))
    notes = {r["implementation"]: (r["note"], r["eager_us"] is None) for r in found["rows"]}
    _, _, *forced = variants("expert_linear")[1]
    assert set(notes) == {"fera_ext", *(f"fera_ext:{v}" for v in forced)}
    assert notes["fera_ext:tiles"] == ("RuntimeError: expert_linear: no such tiles", True)
    assert notes["fera_ext"] == notes["fera_ext:library"] == ("", False)
    assert seen == {"auto", *forced}
    assert "FERA_EXPERT_VARIANT" not in os.environ
    found = runner.measure_all(options("expert_linear", peers="none", experts="3x4", variant="library"))
    assert {r["implementation"] for r in found["rows"]} == {"fera_ext"}


def test_stacked_forms_compile_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="eager", **how))
    for form in peers_expert.FORMS:
        monkeypatch.setattr(runner.Session, "fastest", lambda self, key, contenders, form=form: form)
        found = runner.measure_all(options("expert_linear", dtype="float32", experts="3x4", peers="compiled"))
        rows = [r for r in found["rows"] if r["implementation"] == "compiled"]
        assert [(r["form"], r["note"]) for r in rows] == [(form, "")] * 2
        assert all(r["error"] <= 1e-5 for r in rows)


@pytest.mark.parametrize("masters", [False, True])
def test_peft_is_a_plain_lora(masters: bool) -> None:
    pytest.importorskip("peft", reason="needs peft")
    session = runner.Session(options("expert_linear", masters=masters, dtype="bfloat16", passes="step"))
    layer = expert_linear.layer(session, (2, 5, 24, 40), 3, 4)
    lora_a, lora_b = layer.lora_as[0], layer.lora_bs[0]
    assert lora_a.dtype == (torch.float32 if masters else torch.bfloat16)
    contender = peers_expert.peft_lora(session, layer, "step")
    out, dx, da, db = contender.call()
    assert out.dtype == dx.dtype == torch.bfloat16
    assert da.dtype == db.dtype == lora_a.dtype
    ones = torch.ones_like(layer.gate)
    plain = reference.expert_linear(layer.x, layer.weights[0], None, lora_a, lora_b, ones, peers_expert.SCALE)
    assert runner.relative_error((out,), (plain,)) <= 1e-2
    assert (da.shape, db.shape) == ((12, 24), (40, 12))


def test_peft_says_why_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    session = runner.Session(options("expert_linear"))
    layer = expert_linear.layer(session, (2, 5, 24, 40), 3, 4)
    monkeypatch.setattr(peers_expert.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "peft", None)
    assert peers_expert.peft_lora(session, layer, "step").reason.startswith("ModuleNotFoundError")
    monkeypatch.setattr(peers_expert.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in peers_expert.peft_lora(session, layer, "step").reason
    assert peers_expert.peft_lora(runner.Session(options("expert_linear", peers="none")), layer, "step").reason


@pytest.mark.gpu
def test_linear_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    arguments = ["bench", "expert_linear", "--shapes", "4x256x320x640", "--experts", "3x4", "--device", "cuda"]
    result = CliRunner().invoke(app, [*arguments, "--peers", "frozen,torch,published,peft", "--json", str(path)])
    assert result.exit_code == 0, result.output
    rows = [r for r in json.loads(path.read_text())["rows"] if not r["absent"]]
    assert all(r["warm_us"]["median"] > 0 and r["peak_bytes"] > 0 and r["frozen_ratio"] > 0 for r in rows)
