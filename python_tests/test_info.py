"""`fera-ext info`, the import errors, and what the package says of its build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fera_ext
from fera_ext import _build_info, _extension
from fera_ext.cli import app
from fera_ext.info import probes, report


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
    for word in ("torch operators", "fecl_loss", "FFT", f"{_extension.C.core_cpu_isa} kernels"):
        assert word in result.output


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
