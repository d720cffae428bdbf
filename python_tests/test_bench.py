"""`fera-ext bench` on the CPU, and its GPU clocks on a fake of torch.cuda."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_bench import FakeCuda, bench, fake_cuda_fixture, no_variant, options  # noqa: F401 - fixtures
from typer.testing import CliRunner

from fera_ext import ops, reference
from fera_ext.bands import Bands
from fera_ext.bench import (
    OPERATORS,
    WHOLE,
    cases,
    peers_cufft,
    peers_published,
    peers_torch,
    report,
    runner,
    shapes,
    timing_cuda,
    variants,
)
from fera_ext.bench.timing import spread, wall
from fera_ext.cli import app

TINY = ["--shapes", "2x4x24x40,1x2x3x16x20", "--rounds", "3"]
BANDS, LINEARS = (", ".join(variants(name)[1]) for name in ("band_energy", "expert_linear"))
LATENTS = [name for name in OPERATORS if name != "expert_linear"]


@pytest.mark.parametrize("operator", LATENTS)
def test_files_and_agreement(operator: str, tmp_path: Path) -> None:
    out = tmp_path / "new"
    result = bench(operator, *TINY, "--json", f"{out}/a.json", "--csv", f"{out}/a.csv", "--variant", "grid")
    assert result.exit_code == 0, result.output
    assert "no GPU in use" in result.output
    assert "warm L2" not in result.output
    found = json.loads((out / "a.json").read_text())
    assert set(found) == {
        "schema", "operator", "environment", "settings", "floor", "rows", "failed", "ok", "stopped", "cases", "seconds",
    }  # fmt: skip
    assert {"device", "driver", "cuda", "torch", "cupy", "commit"} <= set(found["environment"])
    assert found["settings"]["variant"] == "grid"
    assert found["floor"] is None
    rows = found["rows"]
    by = {(r["shape"], r["bands"], r["pass"], r["implementation"]): r for r in rows}
    assert len(by) == len(rows)
    passes = {"fecl_loss": ("step", "forward")}.get(operator, ("forward", "backward"))
    for shape in ("2x4x24x40", "1x2x3x16x20"):
        for bands in ("dog(3)", "rings(3)", "author(3)", "custom(3)"):
            for which in passes:
                assert by[shape, bands, which, "fera_ext"]["eager_us"]["samples"] == 3
                assert by[shape, bands, which, "torch"]["error"] <= 1e-4
                published = by[shape, bands, which, "published"]
                if bands == "author(3)" and shape == "2x4x24x40":
                    assert published["error"] <= 1e-4
                else:
                    assert published["absent"]
                    assert published["eager_us"] is None
    for row in rows:
        assert row["warm_us"] is row["cold_us"] is row["launches"] is row["gb_s"] is row["floor_us"] is None
        if row["eager_us"]:
            assert 0 < row["eager_us"]["p10"] <= row["eager_us"]["median"] <= row["eager_us"]["p90"]
    with open(out / "a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert lines[0]["warm_us_median"] == ""
    assert float(lines[0]["eager_us_median"]) == rows[0]["eager_us"]["median"]


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_plot(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = tmp_path / f"a.{kind}"
    result = bench("latent_gate", "--shapes", "2x4x24x40", "--rounds", "3", "--bands", "author:2", "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.stat().st_size > 1000
    if kind == "svg":
        assert "</svg>" in path.read_text()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "a.svg"
    result = bench("band_energy", "--shapes", "2x4x24x40", "--rounds", "3", "--bands", "dog", "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert "matplotlib must be installed" in " ".join(result.output.split())
    assert not path.exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype: str) -> None:
    for operator in OPERATORS:
        found = runner.measure_all(options(operator, dtype=dtype))
        assert found["ok"]
        assert all(r["dtype"] == dtype for r in found["rows"])
        assert not [r["note"] for r in found["rows"] if r["note"]]


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (
            ["nonsense"],
            "operator must be one of band_energy, latent_gate, fecl_loss, expert_linear, step, got 'nonsense'",
        ),
        (["band_energy", "--shapes", "4x64"], "shapes must be default, all, or like 4x4x64x64"),
        (["band_energy", "--shapes", "4x4x0x64"], "got '4x4x0x64'"),
        (["band_energy", "--shapes", "4x4x64x513"], "heights and widths from 1 to 512, got '4x4x64x513'"),
        (["band_energy", "--bands", "wavelet"], "bands must be of dog, rings, author, custom"),
        (["band_energy", "--bands", "dog:1"], "K must be an integer from 2 to 16, got 1"),
        (["band_energy", "--passes", "step"], "passes must be of forward, backward for band_energy, got 'step'"),
        (["band_energy", "--peers", "jax"], "peers must be one of torch, compiled, cufft, published, none"),
        (["band_energy", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["band_energy", "--variant", "fast"], f"variant must be one of {BANDS}, got 'fast'"),
        (["band_energy", "--experts", "3x4"], "experts must be left out for band_energy, got '3x4'"),
        (["band_energy", "--masters"], "masters must be left out for band_energy, got True"),
        (["expert_linear", "--bands", "dog"], "bands must be left out for expert_linear, got 'dog'"),
        (["expert_linear", "--experts", "3"], "experts must be like 3x4,8x64"),
        (["expert_linear", "--experts", "32x17"], "E*r from 1 to 512, got '32x17'"),
        (["expert_linear", "--shapes", "4x16x8x8:0"], "got '4x16x8x8:0'"),
        (["expert_linear", "--shapes", "4x16x8x8x3"], "got '4x16x8x8x3'"),
        (["expert_linear", "--shapes", "16x320"], "shapes must be default, all, or like 4x4096x320x320"),
        (["expert_linear", "--peers", "cufft"], "peers must be one of frozen, torch, compiled, published, peft, none"),
        (["expert_linear", "--passes", "backward"], "passes must be of step, forward for expert_linear"),
        (["expert_linear", "--variant", "grid"], f"variant must be one of {LINEARS}, got 'grid'"),
        (["band_energy", "--plot", "a.jpg"], "plot must end in .svg or .png, got 'a.jpg'"),
        (["band_energy", *TINY, "--json", "/proc/none/a.json"], "No such file or directory"),
    ],
)
def test_errors(arguments: list[str], sentence: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("fera-ext bench: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="device must be cpu without a GPU"):
        cases.pick_device("cuda")


def test_help_is_quick_and_lists_operators() -> None:
    code = "import sys\nfrom fera_ext.cli import app\n"
    code += "try:\n    app(['bench', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 10  # without torch: under a second
    assert all(name in done.stdout for name in OPERATORS | WHOLE)


def test_shapes_and_bands() -> None:
    assert shapes.parse_shapes("4x4x64x64,1x14x4x72x128,4x4x64x64") == ((4, 4, 64, 64), (1, 14, 4, 72, 128))
    assert shapes.parse_shapes("default") == shapes.SHAPES
    assert set(shapes.SHAPES) < set(shapes.ALL_SHAPES)
    assert cases.parse_bands("dog,author:4") == (("dog", 3), ("author", 4))
    for goals in shapes.GOALS.values():
        assert set(goals) <= set(shapes.SHAPES)
    quick = cases.Options.parse("band_energy", device="cpu", quick=True)
    assert quick.shapes == shapes.QUICK_SHAPES
    assert [name for name, _ in quick.bands] == ["dog", "author"]


@pytest.mark.parametrize("height,width", [(8, 10), (9, 7), (1, 1)])
def test_formulations(height: int, width: int) -> None:
    z = torch.randn(2, 3, 2, height, width)
    for name in ("dog", "rings", "author", "custom"):
        bands = cases.make_bands((name, 4), height, width)
        exact = reference.band_energy(z.double(), bands)
        for form in peers_torch.formulations(bands, height, width, z.device):
            found = form.energies(z, *form.constants)
            assert (found - exact).norm() <= 1e-5 * exact.norm(), form.name


@pytest.mark.parametrize("count", [1, 3])
def test_published_pattern(count: int) -> None:
    z = torch.randn(2, 4, 24, 40)
    ours = ops.band_energy(z, Bands.author(count))
    assert runner.relative_error((peers_published.published_energies(z, count),), (ours,)) <= 1e-5


def test_a_rival_that_disagrees_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_torch, "spectral_matmul", lambda z, masks: 2 * z.new_ones(z.shape[0], masks.shape[1]))
    monkeypatch.setattr(runner.Session, "fastest", lambda self, key, contenders: next(iter(contenders)))
    result = bench("band_energy", *TINY, "--bands", "dog", "--passes", "forward", "--peers", "torch")
    assert result.exit_code == 1
    assert "disagrees with fera_ext" in " ".join(result.output.split())


def test_a_rival_that_fails_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such algorithm\nsecond line")

    monkeypatch.setattr(peers_published, "_blur", broken)
    found = runner.measure_all(options(bands="author", passes="forward"))
    row = next(r for r in found["rows"] if r["implementation"] == "published")
    assert row["note"] == "RuntimeError: no such algorithm"
    assert row["eager_us"] is None
    assert found["ok"]
    monkeypatch.setattr(ops, "band_energy", broken)
    found = runner.measure_all(options(bands="author", passes="forward"))
    assert not found["ok"]
    assert not found["rows"]
    assert found["failed"][0]["error"] == "RuntimeError: no such algorithm"


def test_answers_of_another_shape_are_an_error() -> None:
    with pytest.raises(ValueError, match="answers must be of shapes"):
        runner.relative_error((torch.ones(2),), (torch.ones(3),))
    assert runner.relative_error((torch.full((2,), float("nan")),), (torch.ones(2),)) != 0


def test_interrupt_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measure, seen = runner.measure, []

    def once(*arguments: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return measure(*arguments)

    monkeypatch.setattr(runner, "measure", once)
    path = tmp_path / "a.json"
    result = bench("band_energy", *TINY, "--json", str(path))
    assert result.exit_code == 130
    assert "stopped" in result.output
    assert {r["bands"] for r in json.loads(path.read_text())["rows"]} == {"dog(3)"}


def test_compile_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: made.append(how) or function)
    found = runner.measure_all(options("fecl_loss", bands="dog,rings", peers="compiled"))
    rows = [r for r in found["rows"] if r["implementation"] == "compiled"]
    assert all(r["eager_us"] and r["error"] <= 1e-4 for r in rows)
    assert made == [{"fullgraph": True, "dynamic": False}] * len(made)
    assert len(made) <= 2  # one a formulation: definitions of one kind share it
    found = runner.measure_all(options(bands="dog", peers="compiled", compile_seconds=0.0))
    assert {r["absent"] for r in found["rows"] if r["implementation"] == "compiled"} == {
        "torch.compile had used up its 0 s (--compile-seconds)"
    }


def test_spread() -> None:
    found = spread([float(i) for i in range(1, 21)])
    assert (found.median, found.p10, found.p90, found.samples) == (10.5, 2.0, 18.0, 20)
    assert spread([3.0]).p10 == 3.0
    calls: list[str] = []
    times = wall({"a": lambda: calls.append("a"), "b": lambda: time.sleep(1e-3)}, torch.device("cpu"), 3, 1e-4)
    assert times["b"].median > 1000 > times["a"].median


@pytest.mark.parametrize("operator", LATENTS)
def test_gpu_columns(operator: str, fake_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cuda, "launches", lambda runs: [2 for _ in runs])
    # The fake's flush takes as long as its capture took, which may be longer than that of a graph with it.
    flush = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(timing_cuda.GpuTimer, "_flush_graph", lambda self, calls: flush)
    for goals in (shapes.GOALS, shapes.EAGER_GOALS):
        for key in goals:
            monkeypatch.setitem(goals, key, {(2, 4, 24, 40): 100})
    path = tmp_path / "a.json"
    result = bench(operator, "--shapes", "2x4x24x40", "--rounds", "3", "--bands", "dog,author", "--json", str(path))
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    assert found["floor"]["copy_bytes"] == 1 << 20
    assert found["floor"]["copy_gb_s"] > 0
    for row in found["rows"]:
        if row["absent"]:
            continue
        assert row["launches"] == 2
        if row["implementation"] == "published":
            assert row["warm_us"] is row["cold_us"] is None
            assert row["note"] == "not capturable"
            continue
        assert row["warm_us"]["median"] > 0
        assert row["cold_us"]["samples"] == 3
        if (operator, row["pass"]) == ("latent_gate", "backward"):
            assert row["floor_us"] is None
        else:
            assert row["gb_s"] == pytest.approx(row["least_bytes"] / row["warm_us"]["median"] / 1e3)
            assert row["floor_share"] == pytest.approx(row["floor_us"] / row["warm_us"]["median"])
    flat = " ".join(result.output.split())
    for words in ("warm L2", "ches", "an empty kernel", "copy of 1 MiB"):
        assert words in flat
    assert ("missed" in flat or "met" in flat) == (operator != "band_energy")
    if pytest.importorskip("matplotlib", reason="needs matplotlib"):
        report.draw(found, tmp_path / "a.svg")


def test_cold_times_are_positive_or_left_out(monkeypatch: pytest.MonkeyPatch, fake_cuda: None) -> None:
    flushes = {"a": 50.0, "late": 50.0, "never": 50.0}
    tries = []

    def replays(self: Any, graphs: Any, rounds: Any = None) -> dict[str, list[float]]:
        tries.append(sorted(name for name in graphs if "flush" not in name))
        late = 80.0 if len(tries) > 1 else 20.0
        both = {"a": 90.0, "late": late, "never": 40.0}
        return {n: [flushes[n.removesuffix(" flush")] if "flush" in n else both[n]] for n in graphs}

    monkeypatch.setattr(timing_cuda.GpuTimer, "replays", replays)
    timer = timing_cuda.GpuTimer(torch.device("cpu"), 1)
    found = timer.cold(dict.fromkeys(flushes, object()), 10)
    assert {name: taken.median for name, taken in found.items()} == {"a": 4.0, "late": 3.0}
    assert tries == [["a", "late", "never"], ["late", "never"], ["never"]]


def test_launches_are_counted_again_where_none_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[3, None, None], [2, None]]
    monkeypatch.setattr(timing_cuda, "_profiled", lambda runs: answers.pop(0))
    assert timing_cuda.launches([lambda: None] * 3) == [3, 2, None]
    assert timing_cuda.launches([]) == answers == []


def test_a_failed_capture_leaves_eager_times(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: Any, run: Any, calls: int = 50, before: Any = None) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    session = runner.Session(options(bands="author"))
    monkeypatch.setattr(timing_cuda.GpuTimer, "capture", capture)
    case = next(iter(__import__("fera_ext.bench.band_energy", fromlist=["cases"]).cases(session.options)))
    rows, _ = runner.measure(case, session)
    assert all(r["warm_us"] is None and r["eager_us"] for r in rows if not r["absent"])
    assert "capture failed" in rows[0]["note"]


def test_a_capture_that_fails_is_ended(fake_cuda: None) -> None:
    def broken() -> None:
        raise RuntimeError("not capturable")

    timer = timing_cuda.GpuTimer(torch.device("cpu"), 3)
    with pytest.raises(RuntimeError, match="not capturable"):
        timer.capture(broken)
    assert FakeCuda.CUDAGraph.alive == set()
    graph = SimpleNamespace(capture_end=broken, reset=lambda: None)
    with timer.shared_memory():
        before = timer._pool
        timer._abandon(graph, before)
        assert timer._pool != before  # whose capture torch may still hold for open
    assert timer._failed == [graph]


def test_count_launches() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, device: Any, start: float, end: float) -> Any:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))

    mark = timing_cuda.MARK
    events = [
        event(f"{mark}0", cpu, 0, 10),
        event(f"{mark}0", cuda, 1, 9),
        event("kernel", cuda, 2, 3),
        event("Memset (Device)", cuda, 4, 5),
        event("aten::mul", cpu, 1, 2),
        event("Stream Sync", cuda, 8, 9),
        event(f"{mark}1", cpu, 20, 30),
        event("kernel", cuda, 21, 22),
        event("kernel", cuda, 40, 41),
    ]
    assert timing_cuda.count_launches(events, 3) == [2, 1, None]


def test_launches_without_a_gpu_are_unknown(fake_cuda: None) -> None:
    z = torch.randn(3)
    assert timing_cuda.launches([lambda: z + 1]) == [None]


@pytest.mark.parametrize(
    "bands,operator,pass_name,reason",
    [
        ("author", "band_energy", "forward", "zero-padded"),
        ("dog", "latent_gate", "backward", "no transform"),
        ("dog", "band_energy", "forward", "CuPy"),
    ],
)
def test_cufft_says_why_it_is_absent(
    bands: str, operator: str, pass_name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_cufft.importlib.util, "find_spec", lambda name: None)
    session: Any = SimpleNamespace(options=SimpleNamespace(peers=("cufft",)), device=torch.device("cuda"))
    found = peers_cufft.cufft(session, operator, pass_name, cases.make_bands((bands, 3), 8, 8), [])
    assert reason in found.reason
    session.options.peers = ()
    assert peers_cufft.cufft(session, operator, pass_name, Bands.dog(3), []).reason == "not asked for"


def test_a_broken_cupy_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_cufft.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cupy", None)
    session: Any = SimpleNamespace(options=SimpleNamespace(peers=("cufft",)), device=torch.device("cuda"))
    for operator, pass_name in peers_cufft.MAKERS:
        tensors = [torch.randn(1, 1, 4, 4)] * 3
        found = peers_cufft.cufft(session, operator, pass_name, Bands.dog(3), tensors)
        assert found.reason.startswith(("ModuleNotFoundError", "ImportError", "TypeError"))


@pytest.mark.gpu
@pytest.mark.parametrize("operator", LATENTS)
def test_on_a_gpu(operator: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    arguments = ["bench", operator, "--shapes", "4x4x64x64", "--device", "cuda", "--peers", "torch,cufft,published"]
    result = CliRunner().invoke(app, [*arguments, "--bands", "dog,author", "--json", str(path)])
    assert result.exit_code == 0, result.output
    ours = [r for r in json.loads(path.read_text())["rows"] if r["implementation"] == "fera_ext"]
    assert ours
    for row in ours:
        said = {key: row[key] for key in ("shape", "bands", "pass", "warm_us", "cold_us", "launches", "note")}
        assert row["warm_us"]["median"] > 0, said
        # Beside other processes on the GPU there may be no cold time; then the row says so.
        assert row["cold_us"]["median"] > 0 if row["cold_us"] else "no cold time" in row["note"], said
        assert (row["launches"] or 0) >= 1, said


def test_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "__file__", str(tmp_path / "a" / "b" / "report.py"))
    monkeypatch.setenv("FERA_COMMIT", "abc")
    assert report.commit() == "abc"
    assert report._output(["/nonexistent/program"]) is None
