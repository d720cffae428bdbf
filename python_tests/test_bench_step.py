"""`fera-ext bench step` on small models: contenders, rows, goals, failures, compiling, the GPU's graphs on a fake."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_bench import bench, fake_cuda_fixture, no_variant  # noqa: F401 - fixtures

pytest.importorskip("diffusers", reason="needs diffusers")

from fera_ext.bench import (
    step,
    step_contenders,
    step_measure,
    step_models,
    step_report,
)
from fera_ext.bench.step_contenders import CONTENDERS, Absence, attached
from fera_ext.bench.step_options import StepOptions

CPU = torch.device("cpu")


def options(**more: Any) -> StepOptions:
    given = {"models": "tiny-sd15", "batch": "1", "rounds": 3, "device": "cpu", "dtype": "float32"}
    found = StepOptions.parse(**{**given, **more})
    return dataclasses.replace(found, sampling_steps=2)


@pytest.fixture(autouse=True)
def few_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_measure, "WARM_UPS", 1)


def model_and_batch(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, step_models.Batch]:
    return step_models.build(name, CPU, dtype), step_models.draw_batch(name, 2, CPU, dtype)


@pytest.mark.parametrize("name", step_models.TINY_MODELS)
def test_models(name: str) -> None:
    model, batch = model_and_batch(name, torch.bfloat16)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        found = batch.predict(model)
    assert found.shape == batch.target.shape
    assert 0.1 < float(found.float().std()) < 10
    again = step_models.build(name, CPU, torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    assert batch.as_latent(batch.target).shape[-2:] == batch.latent_size


def test_published_configurations() -> None:
    import diffusers

    sizes = {}
    for name in step_models.MODELS:
        with torch.device("meta"):
            model = getattr(diffusers, step_models.CLASSES[name])(**step_models.CONFIGS[name])
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes == {"sdxl": 2567463684, "sd15": 859520964, "svd": 1524623082, "flux": sizes["flux"]}


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("model_name", ["tiny-sd15", "tiny-flux"])
def test_contenders_start_as_the_frozen_model_and_leave_it(name: str, model_name: str) -> None:
    if name.startswith("peft"):
        pytest.importorskip("peft", reason="needs peft")
    model, batch = model_and_batch(model_name)
    before = {path: id(module) for path, module in model.named_modules()}
    own = set(vars(model))
    with torch.no_grad():
        want = batch.predict(model)
    if name.startswith("published") and model_name == "tiny-flux":
        with pytest.raises(Absence, match="latents of four axes"), attached(name, model, batch, 3, 4):
            pass
        return
    with attached(name, model, batch, 3, 4) as trainee:
        with torch.no_grad():
            torch.testing.assert_close(trainee.predict(model), want, rtol=1e-4, atol=1e-4)
        call = step_measure.step_call(name, trainee, model)
        losses = [call() for _ in range(4)]
        if trainee.parameters:
            updated = trainee.flat.parameters() if trainee.flat else trainee.parameters
            assert all(p.grad is not None and p.dtype == torch.float32 for p in updated)
            assert float(losses[-1]) < float(losses[0])
        step_measure.without_gradients(trainee)
        assert all(p.grad is None for p in trainee.parameters)
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert set(vars(model)) == own
    assert not any(p.requires_grad for p in model.parameters())


def test_all_train_as_many_low_rank_numbers() -> None:
    pytest.importorskip("peft", reason="needs peft")
    counts = {}
    for name in ("peft", "published", "fera"):
        model, batch = model_and_batch("tiny-sd15")
        with attached(name, model, batch, 3, 4) as trainee:
            counts[name] = sum(p.numel() for p in trainee.parameters)
    assert counts["fera"] == counts["published"]
    assert counts["fera"] - counts["peft"] == 64 * 3 + 64 + 3 * 64 + 3  # the router


@pytest.mark.parametrize("name", ["peft", "peft-bf16", "peft-tensors", "fera", "fera-bf16"])
def test_dtypes_of_what_is_trained(name: str) -> None:
    """Adapters, gradients and optimiser states; FeRA's router is float32 in any case."""
    if name.startswith("peft"):
        pytest.importorskip("peft", reason="needs peft")
    model, batch = model_and_batch("tiny-sd15", torch.bfloat16)
    low = name.endswith(("bf16", "tensors"))
    with attached(name, model, batch, 3, 4) as trainee:
        call = step_measure.step_call(name, trainee, model)
        losses = [float(call()) for _ in range(8)]
        assert losses[-1] < losses[0]
        assert (trainee.flat is None) == (name == "peft-tensors")
        parameters = trainee.flat.parameters() if trainee.flat else trainee.parameters
        sizes = {p.dtype: p.numel() for p in parameters}
        grads = {p.grad.dtype for p in parameters if p.grad is not None}
    want = {torch.bfloat16 if low else torch.float32}
    assert set(sizes) == grads == (want | {torch.float32} if name == "fera-bf16" else want)
    assert max(sizes, key=lambda dtype: sizes[dtype]) == (torch.bfloat16 if low else torch.float32)


@pytest.mark.parametrize("name", ["tiny-sdxl", "tiny-svd"])
def test_fecl_of_other_models(name: str) -> None:
    model, batch = model_and_batch(name, torch.bfloat16)
    with attached("fera+fecl", model, batch, 2, 2) as trainee:
        call = step_measure.step_call("fera+fecl", trainee, model)
        assert torch.stack([call() for _ in range(3)]).isfinite().all()


def test_sampling_follows_the_scheduler() -> None:
    model, batch = model_and_batch("tiny-sdxl")
    calls = []

    def denoise(**inputs: Any) -> Any:
        calls.append(float(inputs["timestep"]))
        return model(**inputs)

    with attached("fera", model, batch, 2, 2) as trainee:
        sample = step_measure.sampling_call(trainee, denoise, 4)
        first = sample()
        assert torch.equal(first, sample())
    assert first.shape == (1, 4, 16, 16)
    assert calls == calls[:4] * 2 == sorted(calls[:4], reverse=True) * 2
    with attached("frozen", model, batch, 2, 2) as trainee:  # the same model while B is zero
        torch.testing.assert_close(step_measure.sampling_call(trainee, model, 4)(), first, rtol=1e-3, atol=1e-3)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.setenv("FERA_COMMIT", "abc")
    paths = [f"--{kind}={tmp_path}/a.{end}" for kind, end in (("json", "json"), ("csv", "csv"), ("plot", "svg"))]
    result = bench(
        "step", "--models", "tiny-sd15", "--batch", "2", "--rounds", "3", "--contenders", "forward,frozen,fera", *paths
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert {
        "schema", "operator", "environment", "settings", "floor", "rows", "failed", "ok", "stopped", "cases", "seconds",
    } == set(found)  # fmt: skip
    assert found["environment"]["commit"] == "abc"
    assert found["environment"]["diffusers"]
    assert [r["implementation"] for r in found["rows"]] == ["forward", "frozen", "fera"]
    for row in found["rows"]:
        assert (row["model"], row["batch"], row["experts"], row["mode"]) == ("tiny-sd15", 2, "3x4", "eager")
        assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert row["samples_per_s"] == pytest.approx(2e3 / row["ms"]["median"])
        assert row["finite"]
        assert row["peak_gib"] is row["absent"] is None
        assert not row["failed"]
    fera = found["rows"][2]
    assert fera["error"] <= 1e-2
    assert fera["frozen_ratio"] == pytest.approx(fera["ms"]["median"] / fera["frozen_beside_ms"])
    assert found["rows"][0]["frozen_beside_ms"] is found["rows"][1]["frozen_beside_ms"] is None
    assert found["rows"][1]["frozen_ratio"] == 1
    assert found["rows"][0]["ms_again"] > 0
    assert fera["ms_again"] is None
    with open(tmp_path / "a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[2]["ms_median"]) == fera["ms"]["median"]
    assert "</svg>" in (tmp_path / "a.svg").read_text()
    assert "tiny-sd15 B=2, a training step" in result.output


def test_a_peak_leaves_out_the_second_frozen_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options(models="tiny-sd15,tiny-sdxl")
    run, case = step.Run(asked, lambda: None), step.StepCase("step", "tiny-sd15", 1, (3, 4))
    allocated = iter([1000, 1000 + 2**29])
    monkeypatch.setattr(run, "_allocated", lambda: next(allocated))

    def peak() -> float:
        row = step.new_row(case, "fera", "eager", asked)
        run._fill(row, step_measure.Taken([1.0], 2**30, torch.zeros(()), {}), case)
        return float(row["peak_gib"])

    run.model("tiny-sd15")
    assert peak() == 1.0
    run.twin("tiny-sd15")
    assert peak() == 0.5
    run.model("tiny-sdxl")  # both of the other are gone
    assert peak() == 1.0


def test_sampling_rows() -> None:
    found = step.measure_all(options(contenders="frozen,published,fera", passes="sampling", models="tiny-sdxl"))
    assert [(r["pass"], r["implementation"]) for r in found["rows"]] == [("sampling", "frozen"), ("sampling", "fera")]
    assert found["ok"]
    assert all(r["finite"] and r["frozen_ratio"] for r in found["rows"])
    assert found["rows"][0]["samples_per_s"] == pytest.approx(1e3 / found["rows"][0]["ms"]["median"])


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--models", "sd3"], "models must be one of sdxl, sd15, flux, svd, tiny-sd15"),
        (["--batch", "1,0"], "batch must be positive numbers like 1,4, got '1,0'"),
        (["--contenders", "lora"], "contenders must be one of forward, frozen, peft"),
        (["--modes", "graph"], "modes must be one of eager, compiled, got 'graph'"),
        (["--passes", "forward"], "passes must be one of step, sampling, got 'forward'"),
        (["--models", "tiny-flux", "--sampling"], "models must have an sdxl or sd15 for sampling, got 'tiny-flux'"),
        (["--dtype", "float16"], "dtype must be one of float32, bfloat16, got 'float16'"),
        (["--experts", "3"], "experts must be like 3x4,8x64"),
        (["--shapes", "4x4x64x64"], "shapes must be left out for step, got '4x4x64x64'"),
        (["--bands", "dog"], "bands must be left out for step, got 'dog'"),
        (["--masters"], "masters must be left out for step, got True"),
        (["--peers", "peft"], "peers must be left out for step, got 'peft'"),
        (["--variant", "mma"], "variant must be left out for step, got 'mma'"),
    ],
)
def test_errors(arguments: list[str], sentence: str) -> None:
    result = bench("step", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("fera-ext bench: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", [("--models", "sdxl"), ("--batch", "4"), ("--modes", "eager"), ("--sampling",)])
def test_options_that_operators_do_not_have(option: tuple[str, ...]) -> None:
    result = bench("band_energy", *option)
    assert result.exit_code == 1
    assert f"{option[0][2:]} must be left out for band_energy, got" in result.stderr


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = bench("step")
    assert result.exit_code == 1
    assert "diffusers must be installed for step" in result.stderr


def test_a_failure_costs_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(step_contenders.Published, "loss", broken)
    found = step.measure_all(options(contenders="published,fera"))
    published, fera = found["rows"]
    assert published["failed"]
    assert published["note"] == "failed: RuntimeError: no such kernel"
    assert fera["ms"]
    assert found["ok"]  # a rival's
    monkeypatch.setattr(step_contenders.Fera, "loss", broken)
    found = step.measure_all(options(contenders="frozen,fera"))
    assert not found["ok"]
    assert found["failed"][0]["case"] == "tiny-sd15 B=1 3x4 step fera eager"
    assert found["rows"][0]["ms"]

    def no_memory(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(step_contenders.Fera, "loss", no_memory)
    found = step.measure_all(options(contenders="fera"))
    assert found["rows"][0]["note"] == "failed: out of memory"
    assert found["ok"]


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> Any:
        monkeypatch.setattr(step.runner, "device_is_lost", lambda device: True)
        monkeypatch.setattr(step_measure, "free", lambda timer: 1 / 0)  # would raise the device's error again
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(step_contenders.Published, "loss", crash)
    found = step.measure_all(options(contenders="frozen,published,fera"))
    assert [bool(r["ms"]) for r in found["rows"]] == [True, False]
    assert found["rows"][1]["note"] == "failed: RuntimeError: an illegal memory access"
    assert not found["ok"]
    assert "the device is lost after published: failed: RuntimeError" in found["failed"][0]["error"]


def test_attention_is_chosen() -> None:
    seen = []

    def denoise(*_: Any) -> None:
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))

    with step._settings(options(attention="flash")):
        denoise()
    with step._settings(options()):
        denoise()
    assert seen == [(True, False), (True, True)]
    result = bench("step", "--attention", "paged")
    assert result.exit_code == 1
    assert "attention must be one of flash, efficient, math, cudnn, got 'paged'" in result.stderr


def test_a_wrong_first_loss_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = step_contenders.Fera.predict
    monkeypatch.setattr(step_contenders.Fera, "predict", lambda self, denoise: 1.5 * predict(self, denoise))
    found = step.measure_all(options(contenders="fera"))
    assert not found["ok"]
    assert "the frozen model's" in found["rows"][0]["note"]


def test_interrupt_and_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    eager, seen = step_measure.eager, []

    def once(*arguments: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return eager(*arguments)

    monkeypatch.setattr(step_measure, "eager", once)
    path = tmp_path / "a.json"
    result = bench("step", "--models", "tiny-sd15", "--rounds", "3", "--json", str(path))
    assert result.exit_code == 130
    rows = json.loads(path.read_text())["rows"]
    assert rows[0]["ms"]
    assert len(rows) == 2
    monkeypatch.setattr(step_measure, "eager", eager)
    found = step.measure_all(options(contenders="frozen,fera", budget=0.0))
    assert {r["absent"] for r in found["rows"]} == {"the run's 0 s were over (--budget)"}


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_measure, "BACKEND", "eager")
    found = step.measure_all(options(contenders="fera+fecl,published", modes="compiled"))
    assert found["ok"], found["failed"]
    row, published = found["rows"]
    assert (row["graph_breaks"], row["recompilations"]) == (0, 0)
    assert row["ms"]
    assert row["compile_seconds"] > 0
    assert published["absent"]
    found = step.measure_all(options(contenders="fera", modes="compiled", compile_seconds=0.0))
    assert "--compile-seconds" in found["rows"][0]["absent"]


def test_graphs(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.replace(options(contenders="frozen,published,fera"), modes=("eager", "graph"))
    found = step.measure_all(asked)
    assert found["ok"], found["failed"]
    by = {(r["implementation"], r["mode"]): r for r in found["rows"]}
    for name in ("frozen", "fera"):
        assert by[name, "graph"]["ms"]["samples"] == 3
        assert by[name, "graph"]["loss"] > 0
        assert by[name, "graph"]["peak_gib"] == pytest.approx(3 / 1024)
    assert by["published", "graph"]["absent"] == "no CUDA graph can hold it"
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda self, **options: 1 / 0)
    found = step.measure_all(dataclasses.replace(asked, contenders=("frozen", "fera")))
    assert [bool(r["failed"]) for r in found["rows"]] == [False, True, False, True]
    assert not found["ok"]


def test_goals() -> None:
    def row(name: str, mode: str, ms: float, peak: float) -> dict[str, Any]:
        made = step.new_row(
            step.StepCase("step", "sdxl", 4, (3, 4)), name, mode, dataclasses.replace(options(), dtype=torch.bfloat16)
        )
        return made | {"ms": {"median": ms, "p10": ms, "p90": ms, "samples": 3}, "peak_gib": peak}

    times = {"forward": 30.0, "frozen": 100.0, "peft": 150.0, "fera": 112.0, "fera+fecl": 145.0}
    more = {"peft-bf16": 140.0, "fera-bf16": 111.0}
    peaks = {"peft": 20.0, "peft-bf16": 18.0, "fera-bf16": 18.5}
    rows = [row(name, "eager", ms, peaks.get(name, 19.0)) for name, ms in (times | more).items()]
    step_report.finish_rows(rows)
    fera, fecl, low = rows[3], rows[4], rows[6]
    # Times against the faster PEFT, memory against the one of the same dtype.
    assert fera["peft_ratio"] == pytest.approx(112 / 140)
    assert (low["goal_frozen_ratio"], low["goal_peft_ratio"], low["goal_peak_gib"]) == (None, None, 18.0)
    assert low["goals_met"] is False
    assert "≤ peft's 20.00 GiB [green]met" in step_report._goal(fera)
    assert "≤ peft-bf16's 18.00 GiB [red]missed" in step_report._goal(low)
    assert (fera["goal_frozen_ratio"], fera["goal_peft_ratio"], fera["goal_peak_gib"]) == (1.15, 0.85, 20.0)
    assert fera["frozen_ratio"] == pytest.approx(1.12)
    assert fera["goals_met"] is True
    assert fecl["goal_ms"] == pytest.approx(112 + 1.05 * 30)
    assert fecl["goals_met"] is False
    rows[0]["ms_again"] = 36.0  # the host had become slower
    step_report.finish_rows(rows)
    assert fecl["goal_ms"] == pytest.approx(112 + 1.05 * 33)
    rows[1]["ms_again"] = 80.0  # the host had become faster
    step_report.finish_rows(rows)
    assert fera["goals_met"] is False
    # In turns with the frozen step: 100 ms then, 125 ms in the rows of half the speed.
    for one in rows[2:]:
        one["frozen_beside_ms"] = 100.0
    rows[4]["frozen_beside_ms"] = 125.0
    step_report.finish_rows(rows)
    assert fera["frozen_ratio"] == pytest.approx(1.12)
    assert fera["goals_met"] is True
    assert fecl["goal_ms"] == pytest.approx(125 / 100 * 112 + 1.05 * 33 * 125 / 90)


@pytest.mark.gpu
# The tiny FLUX has no finite gradients in bfloat16 on a GPU, with plain PyTorch either (test_attach_devices.py).
@pytest.mark.parametrize(("models", "dtype"), [("tiny-sdxl,tiny-svd", "bfloat16"), ("tiny-flux", "float32")])
def test_graphs_on_a_gpu(models: str, dtype: str) -> None:
    asked = StepOptions.parse(
        models=models,
        batch="2",
        rounds=3,
        device="cuda",
        dtype=dtype,
        modes="eager,graph",
        sampling="sdxl" in models,
    )
    found = step.measure_all(dataclasses.replace(asked, sampling_steps=3))
    assert found["ok"], (found["failed"], [r for r in found["rows"] if r["failed"] or r["error"] or not r["finite"]])
    assert not [r["note"] for r in found["rows"] if r["failed"]]
    by = {(r["pass"], r["model"], r["implementation"], r["mode"]): r for r in found["rows"]}
    for row in found["rows"]:
        assert row["absent"] or (row["finite"] and row["peak_gib"] > 0)
    for model in asked.models:
        eager, graph = (by["step", model, "fera", mode] for mode in ("eager", "graph"))
        assert graph["ms"]["median"] < eager["ms"]["median"]
        assert graph["loss"] < 1.5 * eager["loss"]  # it trains on
