"""`fera-ext info`, the import errors, and what the package says of its build."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fera_ext
from fera_ext import _build_info, _extension
from fera_ext.bands import Bands
from fera_ext.cli import app
from fera_ext.info import probes, report, variants


def test_everything_works_here() -> None:
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["ok"]
    assert {row["operator"] for row in found["operators"]} == set(fera_ext.ops.__all__)
    assert all(row["error"] <= probes.LIMIT for row in found["operators"])


def test_cpu_kernels_use_torchs_threads() -> None:
    assert _extension.C.parallel, "the bindings were compiled without OpenMP: at::parallel_for would be serial"


def test_tables() -> None:
    result = CliRunner().invoke(app, ["info", "--explain"], terminal_width=200)
    assert result.exit_code == 0
    isa = _extension.C.core_cpu_isa
    for word in ("torch operators", "fecl_loss", "FFT", "banded", f"{isa} kernels", variants.VARIABLE):
        assert word in result.output
    for name in variants.SINGLE:
        assert f"{name}: " in result.output


CPU = torch.device("cpu")


@pytest.mark.parametrize("bands", [Bands.dog(3), Bands.author(3)], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", list(variants.DTYPES), ids=str)
def test_the_cpus_variant(dtype: torch.dtype, bands: Bands) -> None:
    for shape in ((2, 4, 64, 64), (2, 3, 4, 33, 20), (2, 16, 16), (0, 4, 8, 8)):
        assert variants.band_variant(shape, dtype, bands, CPU) == _extension.C.core_cpu_isa


@pytest.mark.skipif(_extension.C.core_cuda, reason="this core was built with CUDA")
def test_no_variant_without_cuda() -> None:
    assert _extension.C.band_variant(1, 4, 64, 64, 0, 3, [], True) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("wish", ["", "auto", "cluster", "grid", "nonsense"])
def test_the_gpus_variant(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variants.VARIABLE, wish)
    device = torch.device("cuda")
    clusters = torch.cuda.get_device_capability() >= (9, 0)
    usual = variants.band_variant((2, 4, 64, 64), torch.float32, Bands.dog(3), device)
    odd = variants.band_variant((1, 3, 509, 31), torch.float32, Bands.dog(3), device)
    cluster = "cluster" if clusters else "" if wish == "cluster" else "grid"
    assert usual == {"grid": "grid", "nonsense": ""}.get(wish, cluster)
    assert odd == {"cluster": "", "nonsense": ""}.get(wish, "grid")


def test_explain_in_json() -> None:
    result = CliRunner().invoke(app, ["info", "--explain", "--json"])
    assert result.exit_code == 0, result.output
    explained = json.loads(result.output)["explain"]
    rows = explained["variants"]
    cpu = [row for row in rows if row["device"] == "cpu"]
    assert len(cpu) == 2 * len(variants.LATENTS)
    assert {row["variant"] for row in cpu} == {_extension.C.core_cpu_isa}
    assert {row["bands"] for row in rows} == {"dog", "author"}
    assert {row["dtype"] for row in rows} == {"float32", "float64"}
    assert all(row["why"] for row in rows)
    assert variants.VARIABLE in explained["force"]
    assert set(explained["operators"]) == {"router_softmax", "expert_linear", "expert_linear_group", "expert_update"}
    assert ("no GPU in use" in explained["note"]) == (len(rows) == len(cpu))


@pytest.mark.parametrize("isa,reason", [("generic", "forced by FERA_CPU_ISA"), ("", "the widest instruction set here")])
def test_the_cpus_reason(isa: str, reason: str) -> None:
    code = (
        "from fera_ext.info import variants; import torch; print(variants.explain([torch.device('cpu')])['variants'])"
    )
    env = {**os.environ, "FERA_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(reason) == 2 * len(variants.LATENTS)


@pytest.mark.parametrize(
    "wish,capability,found",
    [
        ("", (9, 0), {"cluster": "a kernel for 64 x 64", "grid": "no cluster kernel for 509 x 31"}),
        ("auto", (8, 0), {"grid": "no thread block clusters before sm_90"}),
        ("grid", (9, 0), {"grid": "forced by FERA_BAND_VARIANT"}),
        ("cluster", (9, 0), {"cluster": "a kernel for 64 x 64", "": "what this latent does not have"}),
        ("nonsense", (9, 0), {"": "asks for no variant"}),
    ],
)
def test_a_gpus_reasons(
    wish: str, capability: tuple[int, int], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words, with the dispatcher's answers of a GPU that need not be here."""

    def answer(n: int, p: int, h: int, w: int, dtype: int, bands: int, reach: list[int], cuda: bool) -> str:
        if not cuda:
            return "generic"
        cluster = capability >= (9, 0) and not reach and dtype != 3 and (h, w) in ((64, 64), (128, 128)) and p < 9
        if wish not in ("", "auto", "cluster", "grid") or (wish == "cluster" and not cluster):
            return ""
        return "cluster" if cluster and wish != "grid" else "grid"

    monkeypatch.setenv(variants.VARIABLE, wish)
    monkeypatch.setattr(_extension, "C", SimpleNamespace(band_variant=answer))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    explained = variants.explain([CPU, torch.device("cuda", 0)])
    rows = [row for row in explained["variants"] if row["device"] == "cuda:0"]
    for variant, words in found.items():
        assert any(row["variant"] == variant and words in row["why"] for row in rows), (variant, words, rows)
    assert {row["variant"] for row in rows} == set(found)
    assert explained["note"] == ""
    if wish == "" and capability == (9, 0):
        why = {(tuple(row["latent"]), row["dtype"], row["bands"]): row["why"] for row in rows}
        assert "none that fits" in why[(4, 16, 128, 128), "float32", "dog"]
        assert "spectral" in why[(1, 4, 64, 64), "float32", "author"]
        assert "float64" in why[(4, 4, 64, 64), "float64", "dog"]
    console = Console(record=True, width=200, file=io.StringIO())
    variants.render(explained, console)
    shown = console.export_text()
    assert "variants of the band kernels on cuda:0" in shown
    assert "generic for every latent" in shown


def test_module_entry_point_defaults_to_info() -> None:
    done = subprocess.run([sys.executable, "-m", "fera_ext"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "band_energy" in done.stdout


def test_a_wrong_operator_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LIMIT", -1.0)
    found = report.collect()
    assert not found["ok"]
    assert "disagree" in found["advice"][-1]
    report.render(found)


def test_a_crashing_operator_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fera_ext.ops, "fecl_loss", broken)
    rows = {row["operator"]: row for row in report.collect()["operators"]}
    assert rows["fecl_loss"]["message"] == "RuntimeError: no such kernel"
    assert rows["band_energy"]["ok"]


@pytest.mark.parametrize(
    "runtime,build,sentence",
    [
        ({"torch_cuda": None, "gpus": []}, {"operators_cuda": False}, "torch is a CPU build"),
        ({"torch_cuda": "13.0", "gpus": []}, {"operators_cuda": False}, "built without"),
        ({"torch_cuda": "13.0", "gpus": []}, {"operators_cuda": True}, "no GPU is visible"),
        (
            {"torch_cuda": "13.0", "gpus": [{"name": "X", "capability": 75, "covered": False}]},
            {"operators_cuda": True},
            "TORCH_CUDA_ARCH_LIST=7.5",
        ),
    ],
)
def test_advice(runtime: dict, build: dict, sentence: str) -> None:
    assert any(sentence in line for line in report._advice(build, runtime))


@pytest.mark.parametrize(
    "capability,targets,covered",
    [
        (90, "90a-real", True),
        (90, "80-real", False),
        (89, "80-real,86-real", True),
        (100, "90a-real", False),
        (100, "90a-real,75-virtual", True),
        (75, "80-real,80-virtual", False),
        (80, "", False),
    ],
)
def test_covered(capability: int, targets: str, covered: bool) -> None:
    assert report._covered(capability, targets) is covered


def test_another_torch_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_build_info.INFO, "torch", "1.2.3")
    with pytest.raises(ImportError, match=r"built against, 1\.2\.3, got .*pip install --no-build-isolation"):
        _extension.load()


def test_not_built_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fera_ext._build_info", None)
    with pytest.raises(ImportError, match="must be built first"):
        _extension.load()


def test_a_missing_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fera_ext._C", None)
    monkeypatch.delattr(fera_ext, "_C", raising=False)
    with pytest.raises(ImportError, match=r"its libraries must load, got: .*rebuild"):
        _extension.load()


def test_stale_bindings_are_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "BINDINGS", -1)
    with pytest.raises(ImportError, match=r"bindings must be of version -1, got \d+; rebuild"):
        _extension.load()


def test_info_survives_a_broken_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fera_ext._extension")
    monkeypatch.setitem(_build_info.INFO, "torch", "1.2.3")
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 1
    assert "1.2.3" in result.output


def test_help_does_not_import_torch() -> None:
    code = "import sys, fera_ext.cli; assert 'torch' not in sys.modules, 'torch was imported'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_load_lazily() -> None:
    assert "attach" in dir(fera_ext)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fera_ext.nonsense  # noqa: B018
    assert fera_ext.Bands.dog(3).count == 3


def test_readme_has_no_placeholder() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    assert "@@" not in readme.read_text()
