"""benchmarks/choose_expert_variant.py on made-up results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "choose_expert_variant.py"
if not PATH.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
_spec: Any = importlib.util.spec_from_file_location("choose_expert_variant", PATH)
choose = importlib.util.module_from_spec(_spec)
sys.modules["choose_expert_variant"] = choose
_spec.loader.exec_module(choose)


def rows(tokens: int, experts: str, forward: dict[str, float], step: dict[str, float], **more: Any) -> list[Any]:
    """Result rows of one shape, 100 in and out."""
    fixed = {"dtype": "bfloat16", "experts": experts, "tokens": tokens, "in": 100, "out": 100, "linears": 1} | more
    return [
        {**fixed, "pass": which, "implementation": f"fera_ext:{variant}", "warm_us": {"median": time}}
        for which, times in (("forward", forward), ("step", step))
        for variant, time in times.items()
    ]


def result(*groups: list[Any], capability: str | None = "9.0") -> dict[str, Any]:
    where = {"capability": capability, "device": "A GPU", "torch": "2.11", "commit": "abc"}
    others = [
        {"implementation": "fera_ext", "warm_us": {"median": 0.1}, "pass": "step"},
        {"implementation": "frozen", "warm_us": None, "pass": "step"},
    ]
    return {"environment": where, "rows": others + [row for group in groups for row in group]}


MEASURED = result(
    # Small tokens: tiles; from 4000 on library in the forward. The backward is always library's.
    rows(1000, "3x4", {"tiles": 5.0, "library": 9.0}, {"tiles": 25.0, "library": 19.0}),
    rows(4000, "3x4", {"tiles": 20.0, "library": 12.0}, {"tiles": 80.0, "library": 40.0}),
    rows(9000, "3x4", {"tiles": 40.0, "library": 22.0}, {"tiles": 160.0, "library": 80.0}),
    # R = 128: library, but for a gap too small to be worth a second row.
    rows(1000, "4x32", {"tiles": 8.99, "library": 9.0}, {"tiles": 40.0, "library": 19.0}),
    rows(4000, "4x32", {"tiles": 60.0, "library": 12.0}, {"tiles": 200.0, "library": 40.0}),
    # A group of linears is no shape of the single operator's table.
    rows(4000, "4x32", {"mma": 1.0}, {"mma": 2.0}, linears=3),
)


def test_rows() -> None:
    measured = choose.points([MEASURED])
    found = choose.choose(measured)
    assert found == [
        choose.Row("forward", "bfloat16", 90, 12, 4000 * 200, "library"),
        choose.Row("forward", "bfloat16", 90, 12, 0, "tiles"),
        choose.Row("forward", "bfloat16", 90, 512, 0, "library"),
        choose.Row("backward", "bfloat16", 90, 512, 0, "library"),
    ]
    assert [choose.pick(found, p) for p in measured if (p.which, p.rank) == ("forward", 12)] == [
        "tiles", "library", "library",
    ]  # fmt: skip
    backward = next(p for p in measured if p.which == "backward")
    assert backward.times == {"tiles": 20.0, "library": 10.0}


def test_architectures_and_failed_variants() -> None:
    """The newer part's rows come first; a variant without a time at one shape is not picked for its rank."""
    older = result(rows(1000, "3x4", {"tiles": 1.0}, {"tiles": 3.0}), capability="8.6")
    newer = result(
        rows(1000, "3x4", {"mma": 1.0, "tiles": 2.0}, {}), rows(1001, "3x4", {"tiles": 2.0}, {}), capability="9.0"
    )
    found = choose.choose(choose.points([older, newer]))
    forward = [(r.arch, r.min_size, r.variant) for r in found if r.which == "forward"]
    assert forward == [(90, 1001 * 200, "tiles"), (90, 0, "mma"), (86, 0, "tiles")]
    assert [(r.arch, r.variant) for r in found if r.which == "backward"] == [(86, "tiles")]


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(MEASURED))
    choose.main([str(path), "--header", str(tmp_path / "a.inc"), "--table", str(tmp_path / "a.md")])
    text = (tmp_path / "a.inc").read_text()
    assert "//   a.json: A GPU, torch 2.11, commit abc" in text
    assert "{Pass::forward, FERA_BF16, 90, 12, 800000, Variant::library}," in text
    assert all(line.startswith(("//", "{")) for line in text.splitlines())
    table = (tmp_path / "a.md").read_text()
    assert "| forward | bfloat16 | 90 | 12 | 1000, 100→100 | 9.0 | 5.0 | tiles | 0.0 % |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    printed = capsys.readouterr().out
    assert text in printed
    assert table in printed
    path.write_text(json.dumps(result(capability=None)))
    with pytest.raises(SystemExit, match="results must hold GPU times of forced variants"):
        choose.main([str(path)])
