"""Tables, files and the plot of a benchmark."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fera_ext.bench.cases import OURS, is_ours

COLOURS = {
    OURS: "#0072b2",
    "torch": "#e69f00",
    "compiled": "#cc79a7",
    "cufft": "#009e73",
    "published": "#d55e00",
    "peft": "#f0e442",
    "frozen": "#000000",
}
"""Okabe and Ito's, told apart with every kind of colour vision; bars stand in this order, forced variants after."""
VARIANT_COLOURS = ("#56b4e9", "#999999", "#004488", "#882255", "#44aa99", "#ddcc77")
"""Of the operator's forced variants, in the order of their rows; around again after the last."""
TIMES = ("warm_us", "cold_us", "eager_us", "ms")
NOTE_WIDTH = 48
"""Characters; longer notes are folded."""
WIDEST = 1000
STATISTICS = ("median", "p10", "p90", "samples")


def _output(command: list[str], folder: Path | None = None) -> str | None:
    """What a program prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """FERA_COMMIT; else the commit of the source tree, "-dirty" after it where files differ; else None.

    The variable comes first: a tree that was copied to another machine may have a history there that is not its own.
    """
    if os.environ.get("FERA_COMMIT"):
        return os.environ["FERA_COMMIT"]
    root = Path(__file__).parents[2]
    found = _output(["git", "rev-parse", "HEAD"], root) if (root / ".git").exists() else None
    if found is None:
        return None
    return found + ("-dirty" if _output(["git", "status", "--porcelain", "-uno"], root) else "")


def environment(device: Any) -> dict[str, Any]:
    """Where the times were taken: machine, GPU, driver, versions, commit; what is unknown is None."""
    import torch

    import fera_ext

    found: dict[str, Any] = {
        "device": f"CPU {platform.machine()}",
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "cupy": None,
        "peft": None,
        "diffusers": None,
        "fera_ext": fera_ext.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    for package in ("cupy", "peft", "diffusers"):
        if importlib.util.find_spec(package):
            from importlib.metadata import packages_distributions, version

            names = packages_distributions().get(package, [])
            found[package] = version(names[0]) if names else "unknown"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = found["gpu"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = getattr(properties, "L2_cache_size", None)
        drivers = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found["driver"] = drivers.splitlines()[0] if drivers else None
    return found


def finish_rows(rows: list[dict[str, Any]], floor: dict[str, Any] | None) -> None:
    """Sorts the rows by shape, in the order of their first appearance, and adds what follows from the times.

    Added are ``gb_s`` and ``floor_share`` (of the warm time), ``cold_gb_s``, ``cold_floor_share``, and
    ``floor_us``, the least bytes at the copy's rate; None where something was not measured. Rows with FLOPs have
    the roofline for a floor, the longer of bytes at the copy's rate and FLOPs at the product's, and get ``tflop_s``,
    ``frozen_ratio`` and ``eager_frozen_ratio``, their times over the frozen linear's of the same case; a goal's ratio
    becomes microseconds too.
    """
    order: dict[str, int] = {}
    for row in rows:
        order.setdefault(row["shape"], len(order))
        least = row["least_bytes"]
        row["floor_us"] = _floor_us(row, floor)
        for key, prefix in (("warm_us", ""), ("cold_us", "cold_")):
            time = row[key] and row[key]["median"]
            usable = bool(time and time > 0 and least and floor)
            row[f"{prefix}gb_s"] = least / time / 1e3 if usable else None
            row[f"{prefix}floor_share"] = row["floor_us"] / time if usable else None
    _compare_with_frozen([row for row in rows if "least_flops" in row])
    rows.sort(key=lambda row: order[row["shape"]])


def _floor_us(row: dict[str, Any], floor: dict[str, Any] | None) -> float | None:
    if not floor or not row["least_bytes"]:
        return None
    moved = row["least_bytes"] / floor["copy_gb_s"] / 1e3
    flops = row.get("least_flops")
    return max(moved, flops / floor["product_tflop_s"] / 1e6) if flops else moved


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["bands"], row.get("experts"), row["pass"]


def _median(times: dict[str, Any] | None) -> float | None:
    return times["median"] if times else None


def _compare_with_frozen(rows: list[dict[str, Any]]) -> None:
    frozen = {_case(row): row for row in rows if row["implementation"] == "frozen"}
    for row in rows:
        time = _median(row["warm_us"])
        row["tflop_s"] = row["least_flops"] / time / 1e6 if time else None
        base = frozen.get(_case(row))
        for key, name in (("warm_us", "frozen_ratio"), ("eager_us", "eager_frozen_ratio")):
            mine, its = _median(row[key]), _median(base[key]) if base else None
            row[name] = mine / its if mine and its else None
        if row["goal_ratio"] and base and base["warm_us"]:
            row["goal_us"] = row["goal_ratio"] * base["warm_us"]["median"]


def number(value: float) -> str:
    """Three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time(times: dict[str, Any] | None) -> str:
    if times is None:
        return ""
    return f"{number(times['median'])} [dim]{number(times['p10'])}–{number(times['p90'])}[/]"


def _goal(row: dict[str, Any]) -> str:
    parts = []
    for kind, goal, times in (("", "goal_us", "warm_us"), ("eager ", "eager_goal_us", "eager_us")):
        if row[goal] is not None and row[times] is not None:
            met = row[times]["median"] <= row[goal]
            ratio = row.get("goal_ratio") if goal == "goal_us" else None
            limit = f"{ratio:g} × frozen" if ratio else f"{row[goal]:g}"
            parts.append(f"{kind}≤ {limit} {'[green]met[/]' if met else '[red]missed[/]'}")
    return "\n".join(parts)


def ratios(rows: Iterable[dict[str, Any]]) -> dict[int, float]:
    """By id of a peer's row: its time over ours, of graphs where both have one, else eager."""
    ours = {_case(r): r for r in rows if r["implementation"] == OURS}
    found = {}
    for row in rows:
        base = ours.get(_case(row))
        for key in ("warm_us", "eager_us"):
            if base and base is not row and row[key] and base[key]:
                found[id(row)] = row[key]["median"] / base[key]["median"]
                break
    return found


def render(result: dict[str, Any], console: Any) -> None:
    """Prints one table a shape, and the sentences below them."""
    settings, floor = result["settings"], result["floor"]
    rows = result["rows"]
    factor = ratios(rows)
    tables = [_table(shape, result, factor) for shape in dict.fromkeys(row["shape"] for row in rows)]
    print_tables(tables, console)
    print_below(result, console)
    for name, reason in dict.fromkeys((r["implementation"], r["absent"]) for r in rows if r["absent"]):
        console.print(f"without {name} where {reason}")
    if floor:
        empty = _time(floor["empty_us"])
        console.print(
            f"an empty kernel: {empty} µs; copy of {floor['copy_bytes'] >> 20} MiB: {floor['copy_gb_s']:.0f} GB/s; "
            + _floor_words(floor)
        )
    for row in rows:
        if row["error"] is not None and not row["error"] <= settings["error_limit"]:
            case = f"{row['shape']} {row.get('experts', row['bands'])} {row['pass']}"
            console.print(f"[red]![/] {row['implementation']} at {case} {row['note']}")


def print_tables(tables: list[Any], console: Any) -> None:
    """Tables of one width, as wide as they need to be where nobody sees them on a terminal."""
    if not console.file.isatty():  # a log or a pipe has no width of its own
        free = console.options.update(max_width=WIDEST)
        console.width = max([console.width, *(console.measure(table, options=free).maximum for table in tables)])
    for table in tables:
        console.print(table)


def print_below(result: dict[str, Any], console: Any) -> None:
    """Where the times are from, and what went wrong."""
    from rich.markup import escape

    where = result["environment"]
    seconds = f"{result['seconds']:.0f} s"
    console.print(f"on {where['device']}, torch {where['torch']}, variant {result['settings']['variant']}, {seconds}")
    if where["gpu"] is None and result["floor"] is None:
        threads = where["threads"]
        console.print(f"no GPU in use: wall times on {threads} CPU threads alone; the GPU's columns are left out")
    if result["stopped"]:
        console.print("[yellow]![/] stopped: the rows measured until then")
    for crash in result["failed"]:
        console.print(f"[red]![/] failed: {crash['case']}: {escape(crash['error'])}")


def _table(shape: str, result: dict[str, Any], factor: dict[int, float]) -> Any:
    """The rich table of one shape. factor: :func:`ratios`."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    rows, settings, on_gpu = result["rows"], result["settings"], result["floor"] is not None
    linear = any("least_flops" in row for row in rows)
    setting = "experts" if linear else "bands"
    title = f"{result['operator']} {shape} {_words(shape, rows)}{settings['dtype']}, µs per call: median p10–p90"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = [setting, "pass", "by"]
    columns += ["graph,\nwarm L2", "graph,\ncold L2"] if on_gpu else []
    columns += ["eager wall"]
    columns += ["laun-\nches"] if on_gpu else []
    columns += ["peak\nMiB", "TFLOP/s", "of\nfloor"] if on_gpu and linear else ["GB/s", "of\nfloor"] if on_gpu else []
    columns += ["×\nfrozen"] if linear and on_gpu else []
    columns += ["eager\n× frozen"] if linear else []
    columns += ["× ours", "error", "goal", "note"] if on_gpu else ["× ours", "error", "note"]
    words = (setting, "pass", "by", "goal", "note")
    for column in columns:
        folds = column in ("note", "goal")
        table.add_column(
            column,
            justify="left" if column in words else "right",
            no_wrap=not folds,
            max_width=NOTE_WIDTH if folds else None,
        )
    before = None
    for row in (r for r in rows if r["shape"] == shape and not r["absent"]):
        group = (row[setting], row["pass"])
        if before not in (None, group):
            table.add_section()
        name = row["implementation"]
        cells = {
            setting: row[setting] if group != before else "",
            "pass": row["pass"] if group != before else "",
            "by": f"[bold]{name}[/]" if is_ours(name) else name,
            "graph,\nwarm L2": _time(row["warm_us"]),
            "graph,\ncold L2": _time(row["cold_us"]),
            "eager wall": _time(row["eager_us"]),
            "laun-\nches": "" if row["launches"] is None else str(row["launches"]),
            "GB/s": "" if row["gb_s"] is None else number(row["gb_s"]),
            "of\nfloor": "" if row["floor_share"] is None else f"{100 * row['floor_share']:.1f} %",
            "peak\nMiB": number(row["peak_bytes"] / 2**20) if row.get("peak_bytes") is not None else "",
            "TFLOP/s": number(row["tflop_s"]) if row.get("tflop_s") else "",
            "×\nfrozen": f"{row['frozen_ratio']:.2f}" if row.get("frozen_ratio") else "",
            "eager\n× frozen": f"{row['eager_frozen_ratio']:.2f}" if row.get("eager_frozen_ratio") else "",
            "× ours": f"{factor[id(row)]:.2f}" if id(row) in factor else "",
            "error": "" if row["error"] is None else f"{row['error']:.0e}",
            "goal": _goal(row),
            "note": escape("; ".join(filter(None, (row["form"], row["note"])))),
        }
        table.add_row(*(cells[c] for c in columns))
        before = group
    return table


def _words(shape: str, rows: list[dict[str, Any]]) -> str:
    """A linear's shape in words; nothing for a latent."""
    row = next(r for r in rows if r["shape"] == shape)
    if "tokens" not in row:
        return ""
    linears = f", {row['linears']} linears" if row["linears"] > 1 else ""
    return f"({row['tokens']} tokens, {row['in']}→{row['out']}, {row['gate_rows']} gate rows{linears}) "


def _floor_words(floor: dict[str, Any]) -> str:
    if "product_side" not in floor:
        return "of floor: the least bytes at the copy's rate over the warm time"
    return (
        f"product of side {floor['product_side']}: {floor['product_tflop_s']:.0f} TFLOP/s; of floor: the longer of "
        "least bytes at the copy's rate and FLOPs at the product's, over the warm time"
    )


def save_json(result: dict[str, Any], path: Path) -> None:
    """Everything, indented, keys in their order; NaN as null. The file is whole at any time."""
    text = json.dumps(_plain(result), indent=1, allow_nan=False)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def save_csv(result: dict[str, Any], path: Path) -> None:
    """One line a row, one column a number; what was not measured is empty."""
    flat = []
    for row in result["rows"]:
        line: dict[str, Any] = {}
        for key, value in row.items():
            if key in TIMES:
                line |= {f"{key}_{s}": "" if value is None else value[s] for s in STATISTICS}
            else:
                line[key] = "" if value is None else value
        flat.append(line)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(flat[0]) if flat else [])
        writer.writeheader()
        writer.writerows(flat)


def why_no_plot(path: Path) -> str | None:
    """Why the plot will not be drawn, None if it will.

    Raises:
        ValueError: the path ends neither in .svg nor in .png.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"plot must end in .svg or .png, got {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        return f"{path} will not be drawn: matplotlib must be installed (pip install matplotlib)"
    return None


Bar = tuple[str, str, str, dict[str, Any], bool, float | None]
"""(panel, group, contender, its times, solid, goal)"""


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of µs per call, a group a shape, a panel a band definition and pass, logarithmic.

    A solid bar is the time in a graph with a warm L2, a hatched one eager wall time, where there is no graph.
    A line over a group is the goal.
    """
    rows = [r for r in result["rows"] if r["warm_us"] or r["eager_us"]]
    bars: list[Bar] = []
    for row in rows:
        times, solid = (row["warm_us"], True) if row["warm_us"] else (row["eager_us"], False)
        panel = f"{result['operator']} {row['pass']}, {row.get('experts') or row['bands']}"
        bars.append((panel, row["shape"], row["implementation"], times, solid, row["goal_us"] if solid else None))
    present = list(dict.fromkeys(r["implementation"] for r in rows))
    forced = [name for name in present if name not in COLOURS]
    colours = COLOURS | {name: VARIANT_COLOURS[i % len(VARIANT_COLOURS)] for i, name in enumerate(forced)}
    draw_bars(bars, colours, "µs per call", result, path)


def draw_bars(
    bars: Sequence[Bar],
    colours: Mapping[str, str],
    unit: str,
    result: dict[str, Any],
    path: Path,
    scale: str = "log",
) -> None:
    """Draws bars with their 10th to 90th percentile, one panel below the other.

    Args:
        bars: in the order of their panels and groups.
        colours: of the contenders, in the order of a group's bars.
        unit: of the times.
        result: where and when they were taken.
        path: an .svg or .png.
        scale: of the times' axis, ``log`` or ``linear``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fera_ext"  # the same file from the same numbers
    panels = list(dict.fromkeys(bar[0] for bar in bars))
    groups = list(dict.fromkeys(bar[1] for bar in bars))
    present = {bar[2] for bar in bars}
    names = [name for name in colours if name in present]
    across = 0.85 / max(1, len(names))
    size = (max(6.0, 1.5 + 1.1 * len(groups)), 0.8 + 2.6 * max(1, len(panels)))
    figure, axes = pyplot.subplots(max(1, len(panels)), 1, figsize=size, squeeze=False, layout="constrained")
    labels: dict[str, Any] = {}
    for axis, panel in zip(axes[:, 0], panels):
        for _, group, name, times, solid, goal in (bar for bar in bars if bar[0] == panel):
            place, turn = groups.index(group), names.index(name)
            x = place + (turn - (len(names) - 1) / 2) * across
            spread = [[times["median"] - times["p10"]], [times["p90"] - times["median"]]]
            bar = axis.bar(
                x,
                times["median"],
                across * 0.92,
                color=colours[name],
                hatch=None if solid else "///",
                edgecolor="white",
                linewidth=0.4,
                yerr=spread,
                error_kw={"linewidth": 0.8, "ecolor": "#444444"},
            )
            labels.setdefault(name + ("" if solid else ", eager wall"), bar)
            if goal is not None:
                line = axis.hlines(goal, place - 0.47, place + 0.47, colors="black", linewidth=1.4)
                labels.setdefault("goal", line)
        axis.set_yscale(scale)
        axis.set_title(panel, loc="left", fontsize=10)
        axis.set_ylabel(unit)
        axis.set_xlim(-0.6, len(groups) - 0.4)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.grid(axis="y", which="major", linewidth=0.4)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    where = result["environment"]
    figure.suptitle(f"{where['device']}, torch {where['torch']}, {result['settings']['dtype']}", fontsize=10)
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=max(1, len(labels)), fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
