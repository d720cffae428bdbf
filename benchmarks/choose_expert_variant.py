"""The table by which expert_linear's dispatcher picks a kernel variant, out of measured times.

`python benchmarks/choose_expert_variant.py RESULT.json ... [--header FILE] [--table FILE]`, the results being those of
`fera-ext bench expert_linear --variant all --json RESULT.json`, one a dtype and a GPU.

A variant is picked for each pass (forward; backward: step less forward), dtype, compute capability and stacked rank R,
by one number: the size tokens * (in + out), which is what the low-rank term reads and writes. At each R the rule is the
best single variant, or one below a size and another from it on where that is clearly faster over all shapes. Printed
are the times, and the rows of a C++ table; written to files where asked.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = {"float32": "FERA_F32", "float16": "FERA_F16", "bfloat16": "FERA_BF16"}
"""fera_dtype of fera.h."""
MAX_RANK = 512
CLEARLY = 0.01
"""Two variants must beat one by this much, in the geometric mean over the shapes of a rank."""


@dataclass(frozen=True)
class Point:
    """A measured shape: microseconds of each forced variant."""

    which: str
    dtype: str
    arch: int
    rank: int
    tokens: int
    width: int
    out: int
    times: dict[str, float]

    @property
    def size(self) -> int:
        """tokens * (in + out)"""
        return self.tokens * (self.width + self.out)


@dataclass(frozen=True)
class Row:
    """A row of the dispatcher's table: R up to ``max_rank`` and sizes from ``min_size`` on go to ``variant``."""

    which: str
    dtype: str
    arch: int
    max_rank: int
    min_size: int
    variant: str


def points(results: Iterable[dict[str, Any]]) -> list[Point]:
    """Every measured shape of one linear; of a shape measured twice the last.

    Raises:
        ValueError: no row of a forced variant with a GPU time.
    """
    times: dict[tuple[Any, ...], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        capability = result["environment"].get("capability")
        for row in result["rows"]:
            _, colon, variant = row["implementation"].partition(":")
            if not colon or capability is None or not row["warm_us"] or row.get("linears", 1) != 1:
                continue
            experts, rank = map(int, row["experts"].split("x"))
            arch = int(str(capability).replace(".", ""))
            key = (row["dtype"], arch, experts * rank, row["tokens"], row["in"], row["out"])
            times[key][row["pass"]][variant] = row["warm_us"]["median"]
    if not times:
        raise ValueError(
            "choose_expert_variant: results must hold GPU times of forced variants (--variant all), got none"
        )
    found = []
    for key, passes in sorted(times.items()):
        forward, step = passes.get("forward", {}), passes.get("step", {})
        backward = {v: step[v] - forward[v] for v in step if v in forward and step[v] > forward[v]}
        for which, each in (("forward", forward), ("backward", backward)):
            if each:
                found.append(Point(which, *key, dict(each)))
    return found


def loss(point: Point, variant: str) -> float:
    """How much slower than the point's best a variant is, as a logarithm; without a time it cannot be picked."""
    return math.log(point.times[variant] / min(point.times.values())) if variant in point.times else math.inf


def rule(measured: Sequence[Point]) -> list[tuple[int, str]]:
    """(least size, variant) of the points of one rank, large sizes first."""
    variants = sorted({v for point in measured for v in point.times})
    ordered = sorted(measured, key=lambda p: p.size)

    def total(part: Sequence[Point], variant: str) -> float:
        return sum(loss(point, variant) for point in part)

    def best(part: Sequence[Point]) -> str:
        return min(variants, key=lambda v: total(part, v))

    one = best(ordered)
    chosen, least = [(0, one)], total(ordered, one) - CLEARLY * len(ordered)
    for i in range(1, len(ordered)):
        if ordered[i].size == ordered[i - 1].size:
            continue
        small, large = best(ordered[:i]), best(ordered[i:])
        both = total(ordered[:i], small) + total(ordered[i:], large)
        if both < least:
            chosen, least = [(ordered[i].size, large), (0, small)], both
    return chosen


def choose(measured: Sequence[Point]) -> list[Row]:
    """The dispatcher's rows: newer architectures, small ranks and large sizes first; the first that fits serves."""
    groups: dict[tuple[str, str, int], dict[int, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in measured:
        groups[point.which, point.dtype, point.arch][point.rank].append(point)
    rows = []
    for which, dtype, arch in sorted(groups, key=lambda g: (g[0] != "forward", g[1], -g[2])):
        ranks = groups[which, dtype, arch]
        rules: list[tuple[int, list[tuple[int, str]]]] = []
        for rank in sorted(ranks):
            found = rule(ranks[rank])
            if rules and rules[-1][1] == found:
                rules.pop()  # the next rank has the same rule: one row up to it
            rules.append((rank, found))
        rules[-1] = (MAX_RANK, rules[-1][1])
        rows += [Row(which, dtype, arch, rank, *part) for rank, parts in rules for part in parts]
    return rows


def pick(rows: Sequence[Row], point: Point) -> str:
    """What the dispatcher takes at a point: the first row that fits."""
    return next(
        row.variant
        for row in rows
        if (row.which, row.dtype) == (point.which, point.dtype)
        and row.arch <= point.arch
        and point.rank <= row.max_rank
        and point.size >= row.min_size
    )


def header(rows: Sequence[Row], sources: Sequence[str]) -> str:
    """Rows of a C++ table, to be included between its braces."""
    lines = ["// Written by benchmarks/choose_expert_variant.py: measure again instead of editing. From"]
    lines += [f"//   {source}" for source in sources]
    lines += [
        "// The first row serves whose pass and dtype are the call's and where arch <= the device's compute",
        "// capability, R <= max_rank and tokens * (in + out) >= min_size.",
        "// {pass, dtype, arch, max_rank, min_size, variant}",
    ]
    lines += [
        f"{{Pass::{r.which}, {DTYPES[r.dtype]}, {r.arch}, {r.max_rank}, {r.min_size}, Variant::{r.variant}}},"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def table(measured: Sequence[Point], rows: Sequence[Row]) -> str:
    """Markdown: the times, the variant picked, and what it costs over the best one."""
    variants = sorted({v for point in measured for v in point.times})
    columns = ["pass", "dtype", "arch", "R", "tokens, in→out", *(f"{v} µs" for v in variants), "picked", "over best"]
    lines = [_cells(columns), _cells(["---"] * len(columns))]
    for p in sorted(measured, key=lambda p: (p.which != "forward", p.dtype, -p.arch, p.rank, p.size)):
        picked = pick(rows, p)
        times = [f"{p.times[v]:.1f}" if v in p.times else "" for v in variants]
        over = f"{100 * (math.exp(loss(p, picked)) - 1):.1f} %" if picked in p.times else "no time"
        shape = f"{p.tokens}, {p.width}→{p.out}"
        lines.append(_cells([p.which, p.dtype, str(p.arch), str(p.rank), shape, *times, picked, over]))
    return "\n".join(lines) + "\n"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def source(path: Path, result: dict[str, Any]) -> str:
    """A result in a line: file, GPU, torch, commit."""
    where = result["environment"]
    return f"{path.name}: {where['device']}, torch {where['torch']}, commit {where['commit']}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--header", type=Path, help="write the C++ rows here")
    parser.add_argument("--table", type=Path, help="write the Markdown table here")
    options = parser.parse_args(arguments)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    try:
        measured = points(results)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    rows = choose(measured)
    sources = [source(path, result) for path, result in zip(options.results, results)]
    for path, text in ((options.table, table(measured, rows)), (options.header, header(rows, sources))):
        print(text)
        if path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
