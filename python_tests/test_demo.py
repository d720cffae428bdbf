"""fera-ext demo: the shipped model, the fair comparison, the report, and the whole with very few steps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from fera_ext.demo import charts, experiment, photos
from fera_ext.demo.command import demo
from fera_ext.demo.experiment import Evaluation, Experiment, Sampling, Training
from fera_ext.demo.report import Outcome


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(demo)
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of everything: this is about the demo's parts, not about its figures."""
    for name, value in {"BATCH": 4, "EVALUATED": 12, "SAMPLES": 4, "SAMPLING_STEPS": 3}.items():
        monkeypatch.setattr(experiment, name, value)


@pytest.fixture
def outcome() -> Outcome:
    """An invented outcome; tests change its losses."""

    def training(loss: float) -> Training:
        final = Evaluation(loss, [loss, loss, loss])
        return Training(1000, [0.2, 0.1], [(0, 0.2), (2, loss)], 0.1, final)

    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    sampling = Sampling(images, torch.zeros(4, 3, 8, 8), [2, 1], [[0.5, 0.3, 0.2]] * 2, [[0.4, 0.3, 0.3]] * 2)
    return Outcome(
        seed=0,
        steps=2,
        device="a test",
        seconds=1.0,
        before=Evaluation(0.2, [0.2, 0.2, 0.2]),
        trainings={"LoRA": training(0.15), "FeRA": training(0.12)},
        samplings={"before": sampling, "LoRA": sampling, "FeRA": sampling},
        reloaded=sampling,
        adapter_bytes=2048,
        train_patches=images,
    )


def test_demo_runs(small: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("--output-dir", str(out), "--steps", "3", "--seed", "1", "--device", "cpu", "--no-open")
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.stdout.replace("\n", " ")
    figures = json.loads((out / "results.json").read_text())
    assert set(figures["held_out_loss"]) == {"before", "LoRA", "FeRA"}
    assert all(math.isfinite(v) and v > 0 for v in figures["held_out_loss"].values())
    assert figures["held_out_loss"]["FeRA"] != figures["held_out_loss"]["before"]
    assert figures["reload_error"] == 0.0
    assert len(figures["gates"]) == 3
    assert sum(figures["gates"][0]) == pytest.approx(1.0, abs=1e-5)
    lora, fera = figures["parameters"]["LoRA"], figures["parameters"]["FeRA"]
    assert fera <= lora <= 1.01 * fera
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert page.count("<svg viewBox") >= 4
    assert not re.search(r"https?://|<script|\$\w", page)
    assert figures["verdict"].split(":")[0] in page
    assert (out / "adapter" / "fera_adapter.safetensors").is_file()


@pytest.mark.gpu
def test_demo_runs_on_a_gpu(small: None, tmp_path: Path) -> None:
    result = command("--output-dir", str(tmp_path), "--steps", "3", "--device", "cuda", "--no-open")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "results.json").read_text())
    assert all(math.isfinite(v) and v > 0 for v in figures["held_out_loss"].values())
    assert figures["reload_error"] <= 1e-5


def test_shipped_model_is_small_and_knows_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "EVALUATED", 48)
    files = [p for p in experiment.MODEL_DIR.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 6e6
    assert {p.suffix for p in files} <= {".json", ".md", ".safetensors"}
    x = Experiment(0, torch.device("cpu"))
    model = x.new_model()
    trained = x.evaluate(model).mean
    untrained = type(model).from_config(model.config).eval()
    assert trained < 0.3 < x.evaluate(untrained).mean


def test_both_methods_start_alike(small: None) -> None:
    x = Experiment(0, torch.device("cpu"))
    base, fera_model, lora_model = x.new_model(), x.new_model(), x.new_model()
    before = x.evaluate(base)
    fera = x.new_fera(fera_model)
    lora = x.new_lora(lora_model, fera)
    assert x.evaluate(fera_model).mean == pytest.approx(before.mean, rel=1e-5)
    assert x.evaluate(lora_model).mean == pytest.approx(before.mean, rel=1e-5)
    assert set(lora.layers) == set(fera.matched)
    for one, other in zip(x.batch(5), Experiment(0, torch.device("cpu")).batch(5)):
        assert torch.equal(one, other)


def test_lora_budget_is_kept() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 6), "b": torch.nn.Linear(6, 6)})
    from fera_ext.demo.lora import Lora

    x = torch.randn(3, 4)
    before = model["a"](x)
    lora = Lora(model, ["a", "b"], budget=50, alpha=2.0)
    assert sum(p.numel() for p in lora.parameters()) == 54
    assert torch.equal(model["a"](x), before)
    with torch.no_grad():
        lora.layers["a"].lora_B.fill_(1.0)
    scale = 2.0 / lora.layers["a"].lora_A.shape[0]
    update = scale * (x @ lora.layers["a"].lora_A.T).sum(1, keepdim=True).expand(3, 6)
    torch.testing.assert_close(model["a"](x), before + update)
    with pytest.raises(ValueError, match="budget must be at least 22"):
        Lora(torch.nn.ModuleDict({"a": torch.nn.Linear(4, 6), "b": torch.nn.Linear(6, 6)}), ["a", "b"], 21, 1.0)


@pytest.mark.parametrize(
    ("fera", "lora", "words"),
    [
        (0.12, 0.15, "FeRA won: its held-out loss is 20.0% below LoRA's"),
        (0.15, 0.12, "LoRA won: its held-out loss is 20.0% below FeRA's"),
        (0.149, 0.15, "FeRA won: its held-out loss is 0.7% below LoRA's. So small a gap may turn round"),
        (0.15, 0.1501, "A draw"),
        (0.25, 0.26, "Neither helped"),
    ],
)
def test_verdict_is_honest(fera: float, lora: float, words: str, outcome: Outcome) -> None:
    outcome.trainings["FeRA"].final = Evaluation(fera, [fera] * 3)
    outcome.trainings["LoRA"].final = Evaluation(lora, [lora] * 3)
    assert outcome.verdict().startswith(words)


def test_failed_reload_is_an_error(outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from fera_ext.demo import show

    changed = dataclasses.replace(outcome.reloaded, raw=outcome.reloaded.raw + 0.5)
    wrong = dataclasses.replace(outcome, reloaded=changed)
    monkeypatch.setattr(show, "tracked", lambda *_: wrong)
    result = command("--output-dir", str(tmp_path), "--device", "cpu", "--no-open")
    assert result.exit_code == 1
    assert "5.0e-01" in result.stderr
    assert "differ by at most 5.0e-01" in (tmp_path / "report.html").read_text()


def test_opens_the_report_when_asked(outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import webbrowser

    from fera_ext.demo import show

    opened: list[str] = []
    monkeypatch.setattr(show, "tracked", lambda *_: outcome)
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert command("--output-dir", str(tmp_path), "--device", "cpu", "--open").exit_code == 0
    assert command("--output-dir", str(tmp_path), "--device", "cpu").exit_code == 0
    assert opened == [(tmp_path / "report.html").resolve().as_uri()]


@pytest.mark.parametrize("device", ["tpu", "meta"])
def test_unknown_device(device: str, tmp_path: Path) -> None:
    result = command("--output-dir", str(tmp_path), "--device", device)
    assert result.exit_code == 1
    assert "device must be cpu, cuda or auto" in result.stderr


def test_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command("--output-dir", str(tmp_path / "file" / "out"), "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr.startswith("fera-ext demo: ")


def test_train_and_held_out_share_no_pixel() -> None:
    column = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (40, 100, 3))
    left, right = photos.split(column)
    assert left.max() < right.min()
    assert left.shape[1] + right.shape[1] == 100


def test_patches_come_from_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    patches = photos.random_patches([image], 3, np.random.default_rng(1), size=8)
    assert patches.shape == (3, 3, 8, 8)
    pixels = np.rint((patches[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    windows = [image[i : i + 8, j : j + 8] for i in range(33) for j in range(43)]
    assert any(np.array_equal(pixels, w) or np.array_equal(pixels, w[:, ::-1]) for w in windows)
    shrunk = photos.random_patches([image], 2, np.random.default_rng(1), size=8, scales=(0.25, 0.5))
    assert shrunk.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="at least 64 px"):
        photos.random_patches([image], 1, np.random.default_rng(1), size=64)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 3.0), (-2.0, 7.5), (0.0901, 0.1014), (0, 160)])
def test_ticks_enclose_and_are_few(low: float, high: float) -> None:
    marks = charts.ticks(low, high)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 8
    assert len(set(marks)) == len(marks)


def test_chart_escapes_and_rejects_nothing() -> None:
    chart = charts.line_chart([charts.Line("<b>", [(0, 1), (1, 2)], 0)], "x", "y & z")
    assert "<b>" not in chart
    assert "y &amp; z" in chart
    with pytest.raises(ValueError, match="at least one"):
        charts.line_chart([charts.Line("a", [], 0)], "x", "y")
    assert charts.smooth([1.0, 3.0, 5.0], 2) == [(1.0, 1.0), (2.0, 2.0), (3.0, 4.0)]
