"""Ratios, goals, tables and the plot of `fera-ext bench step`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fera_ext.bench.report import (
    COLOURS,
    NOTE_WIDTH,
    VARIANT_COLOURS,
    Bar,
    draw_bars,
    number,
    print_below,
    print_tables,
)
from fera_ext.bench.shapes import FECL_FORWARDS, SAMPLING_GOALS, STEP_GOALS
from fera_ext.bench.step_contenders import ALIKE, PEFTS
from fera_ext.bench.step_models import MODELS

NAMES = {
    "frozen": COLOURS["frozen"],
    "forward": "#999999",
    "peft": COLOURS["peft"],
    "peft-bf16": VARIANT_COLOURS[5],
    "peft-tensors": "#8c6d4f",
    "published": COLOURS["published"],
    "published+fecl": VARIANT_COLOURS[3],
    "fera": COLOURS["fera_ext"],
    "fera-bf16": VARIANT_COLOURS[4],
    "fera-autocast": VARIANT_COLOURS[2],
    "fera+fecl": VARIANT_COLOURS[0],
}
"""The contenders' colours; bars stand in this order."""
Row = dict[str, Any]
Result = dict[str, Any]


def _key(row: Row) -> tuple[Any, ...]:
    return row["pass"], row["model"], row["batch"], row["experts"], row["mode"]


def finish_rows(rows: list[Row]) -> None:
    """Ratios to the frozen model's row of the same case and mode and to the faster of PEFT's, and goals.

    A time is the mean of the medians before and after the others, where there are two. Eager steps that took turns with
    the frozen model's (``frozen_beside_ms``) are compared with those, and with each other as multiples of those.
    ``peft_ratio`` and its goal are of the faster of PEFT's; a peak is compared with that of the PEFT of the same dtype
    (``ALIKE``).
    """
    found = {(*_key(row), row["implementation"]): row for row in rows if row["ms"]}

    def mean(other: Row) -> float:
        median: float = other["ms"]["median"]
        return median if other["ms_again"] is None else 0.5 * (median + other["ms_again"])

    def milliseconds(row: Row, name: str) -> float | None:
        """Of ``name``, as it would have been in the row's turn."""
        other, mine = found.get((*_key(row), name)), row["frozen_beside_ms"]
        if other is None or mine is None:
            return None if other is None else mean(other)
        if name == "frozen":
            return float(mine)
        its: float | None = other["frozen_beside_ms"]
        if its is None:  # the frozen model's forward
            frozen = found.get((*_key(row), "frozen"))
            its = mean(frozen) if frozen else mine
        return mean(other) * mine / its

    for row in rows:
        if row["ms"] is None:
            continue
        frozen, mine = milliseconds(row, "frozen"), milliseconds(row, row["implementation"])
        row["frozen_ratio"] = mine / frozen if mine and frozen else None
        rivals = [t for t in (milliseconds(row, name) for name in PEFTS) if t]
        row["peft_ratio"] = mine / min(rivals) if mine and rivals else None
        _set_goals(row, found, milliseconds)


def _set_goals(row: Row, found: dict[Any, Row], milliseconds: Callable[[Row, str], float | None]) -> None:
    named = row["dtype"] == "bfloat16" and row["experts"] == "3x4" and row["model"] in MODELS
    name = row["implementation"]
    if not named or name not in (*ALIKE, "fera+fecl"):
        return
    if name == "fera+fecl":
        step, forward = milliseconds(row, "fera"), milliseconds(row, "forward")
        row["goal_ms"] = None if step is None or forward is None else step + FECL_FORWARDS * forward
    else:
        if name == "fera":  # the default is what the times are asked of
            table = STEP_GOALS if row["pass"] == "step" else SAMPLING_GOALS
            goals = table.get((row["model"], row["batch"], row["mode"]), (None, None))
            row["goal_frozen_ratio"], row["goal_peft_ratio"] = goals
        rival = found.get((*_key(row), ALIKE[name]))
        row["goal_peak_gib"] = rival["peak_gib"] if rival and row["pass"] == "step" else None
    pairs = (
        (row["frozen_ratio"], row["goal_frozen_ratio"]),
        (row["peft_ratio"], row["goal_peft_ratio"]),
        (row["ms"]["median"], row["goal_ms"]),
        (row["peak_gib"], row["goal_peak_gib"]),
    )
    met = [got <= goal for got, goal in pairs if got is not None and goal is not None]
    row["goals_met"] = all(met) if met else None


def _time(row: Row) -> str:
    ms = row["ms"]
    return f"{number(ms['median'])} [dim]{number(ms['p10'])}–{number(ms['p90'])}[/]" if ms else ""


def _goal(row: Row) -> str:
    parts = []
    for text, got, goal in (
        (f"≤ {row['goal_frozen_ratio']} × frozen", row["frozen_ratio"], row["goal_frozen_ratio"]),
        (f"≤ {row['goal_peft_ratio']} × peft", row["peft_ratio"], row["goal_peft_ratio"]),
        (f"≤ {row['goal_ms'] or 0:.1f} ms", row["ms"] and row["ms"]["median"], row["goal_ms"]),
        (
            f"≤ {ALIKE.get(row['implementation'])}'s {row['goal_peak_gib'] or 0:.2f} GiB",
            row["peak_gib"],
            row["goal_peak_gib"],
        ),
    ):
        if got is not None and goal is not None:
            parts.append(f"{text} {'[green]met[/]' if got <= goal else '[red]missed[/]'}")
    return "\n".join(parts)


def _note(row: Row) -> str:
    parts = [row["note"]]
    if row["frozen_beside_ms"] is not None:
        parts.append(f"frozen in turns {number(row['frozen_beside_ms'])} ms")
    if row["ms_again"] is not None:
        parts.append(f"{number(row['ms_again'])} ms after the others")
    if row["compile_seconds"] is not None:
        words = f"{row['graph_breaks']} graph breaks, {row['recompilations']} recompilations"
        parts.append(f"compiled in {row['compile_seconds']:.0f} s, {words}")
    return "; ".join(filter(None, parts))


def render(result: Result, console: Any) -> None:
    """Prints a table a model, batch and pass, and the sentences below them."""
    rows = result["rows"]
    groups = list(dict.fromkeys((r["pass"], r["model"], r["batch"]) for r in rows))
    print_tables([_table(group, result) for group in groups], console)
    print_below(result, console)
    for reason in dict.fromkeys(f"without {r['implementation']} where {r['absent']}" for r in rows if r["absent"]):
        console.print(reason)
    for row in rows:
        if row["error"] is not None and not row["error"] <= result["settings"]["error_limit"]:
            console.print(f"[yellow]![/] {row['implementation']} at {row['model']} B={row['batch']}: {row['note']}")


def _table(group: tuple[str, str, int], result: Result) -> Any:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    what, model, batch = group
    kind = "a training step" if what == "step" else f"{result['settings']['sampling_steps']} steps with guidance"
    title = f"{model} B={batch}, {kind}, {result['settings']['dtype']}, ms: median p10–p90"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    left = ("experts", "mode", "by", "goal", "note")
    for column in (*left[:3], "ms", "×\nfrozen", "×\npeft", "peak\nGiB", "samples/s", "loss", *left[3:]):
        folds = column in ("note", "goal")
        table.add_column(
            column,
            justify="left" if column in left else "right",
            no_wrap=not folds,
            max_width=NOTE_WIDTH if folds else None,
        )
    rows = [r for r in result["rows"] if (r["pass"], r["model"], r["batch"]) == group and not r["absent"]]
    before: tuple[str, str] | None = None
    for experts, mode in dict.fromkeys((r["experts"], r["mode"]) for r in rows):
        if before:
            table.add_section()
        for row in (r for r in rows if (r["experts"], r["mode"]) == (experts, mode)):
            name = row["implementation"]
            here = (experts, mode)
            table.add_row(
                experts if here != before else "",
                mode if here != before else "",
                f"[bold]{name}[/]" if name.startswith("fera") else name,
                _time(row),
                *(f"{row[key]:.2f}" if row[key] else "" for key in ("frozen_ratio", "peft_ratio", "peak_gib")),
                number(row["samples_per_s"]) if row["samples_per_s"] else "",
                "" if row["loss"] is None else f"{row['loss']:.4f}",
                _goal(row),
                escape(_note(row)),
            )
            before = here
    return table


def draw(result: Result, path: Path) -> None:
    """Bars of milliseconds, a group a model and batch, a panel a pass, (E, r) and mode.

    A line over a group is what the goal asks of ``fera``.
    """
    rows = [r for r in result["rows"] if r["ms"]]
    frozen = {_key(r): r["ms"]["median"] for r in rows if r["implementation"] == "frozen"}
    bars: list[Bar] = []
    for row in rows:
        ratio = row["goal_frozen_ratio"]
        goal = ratio * frozen[_key(row)] if ratio and _key(row) in frozen else None
        panel = f"{row['pass']} {row['experts']}, {row['mode']}"
        bars.append((panel, f"{row['model']} B={row['batch']}", row["implementation"], row["ms"], True, goal))
    draw_bars(bars, NAMES, "ms", result, path, "linear")
