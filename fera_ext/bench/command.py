"""The `fera-ext bench` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fera_ext.bench import OPERATORS, variants

BAND_VARIANTS, LINEAR_VARIANTS = (", ".join(variants(name)[1]) for name in ("band_energy", "expert_linear"))
LISTED = "; ".join(f"{name}: {what}" for name, what in OPERATORS.items())


def bench(
    operator: Annotated[str, typer.Argument(help=f"One of {', '.join(OPERATORS)}. {LISTED}.")],
    shapes: Annotated[
        str,
        typer.Option(
            help="Latents such as 4x4x64x64,1x14x4x72x128, linears such as 4x4096x320x640 (gate rows, tokens of each, "
            "in, out) or 4x4096x640x640:3 (three on one input); default, or all: every batch size."
        ),
    ] = "default",
    bands: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates it)
        typer.Option(help="Of dog, rings, author, custom (all by default); dog:4 for four bands. Not for linears."),
    ] = None,
    experts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Linears alone: experts x rank, by default 3x4,4x32,8x64."),
    ] = None,
    masters: Annotated[
        bool, typer.Option("--masters", help="Linears alone: adapters in float32, whatever the dtype.")
    ] = False,
    passes: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates it)
        typer.Option(help="Of forward, backward, step; by default those the operator has."),
    ] = None,
    peers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of torch, compiled, cufft, published; for linears of frozen, torch, compiled, published, peft; none; "
            "by default all that the device has."
        ),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32 (the default for latents), bfloat16 (for linears) or float16."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    variant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help=f"Forces a kernel variant: {BAND_VARIANTS}; for linears {LINEAR_VARIANTS} (all, the default: a row "
            "for each)."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Samples of each time; the contenders take turns.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Two shapes, two definitions, nothing compiled.")] = False,
    compile_seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0,
            help="Once torch.compile has used this much, later cases go without it; 45, or no limit beside --budget.",
        ),
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Seconds for the whole run: where it would take longer, torch.compile is left out."),
    ] = None,
    json_path: Annotated[Optional[Path], typer.Option("--json", help="Write everything here.")] = None,  # noqa: UP045
    csv_path: Annotated[Optional[Path], typer.Option("--csv", help="Write the rows here.")] = None,  # noqa: UP045
    plot_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--plot", help="Draw bars into this .svg or .png (needs matplotlib)."),
    ] = None,
) -> None:
    """Time an operator beside plain PyTorch, torch.compile, cuFFT, PEFT and others.

    Each contender's answer is checked against the operator's first. On a GPU:
    time per call of 50 calls in one CUDA graph (fewer where they are long),
    with a warm and a cold L2, eager wall time and launches; for linears peak
    memory too, and ratios to the frozen linear; on a CPU wall times alone.
    Exit status 1 when a contender disagrees, a case crashes or an argument is
    wrong. The JSON is written after every case.
    """
    import os

    if operator not in OPERATORS:
        _fail(f"operator must be one of {', '.join(OPERATORS)}, got {operator!r}")
    variable, known = variants(operator)
    if variant is not None and variant not in known:
        _fail(f"variant must be one of {', '.join(known)}, got {variant!r}")
    if variant is not None and variant != "all":
        # Read by the extension: it must stand before the import below.
        os.environ[variable] = variant
    from rich.console import Console

    console = Console()
    if not console.file.isatty():
        console = Console(width=120, force_terminal=False)
    asked: dict[str, Any] = {
        "shapes": shapes,
        "bands": bands,
        "experts": experts,
        "masters": masters,
        "passes": passes,
        "peers": peers,
        "dtype": dtype,
        "device": device,
        "rounds": rounds,
        "quick": quick,
        "compile_seconds": compile_seconds,
        "budget": budget,
        "variant": variant or os.environ.get(variable) or None,
    }
    try:
        ok = _run(console, operator, asked, json_path, csv_path, plot_path)
    except (ValueError, ImportError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    raise typer.Exit(0 if ok else 1)


def _fail(sentence: str) -> None:
    typer.echo(f"fera-ext bench: {sentence}", err=True)
    raise typer.Exit(1)


def _run(
    console: Any,
    operator: str,
    asked: dict[str, Any],
    json_path: Path | None,
    csv_path: Path | None,
    plot_path: Path | None,
) -> bool:
    from fera_ext.bench.cases import Options
    from fera_ext.bench.report import draw, render, save_csv, save_json, why_no_plot
    from fera_ext.bench.runner import measure_all

    options = Options.parse(operator, **asked)
    no_plot = why_no_plot(plot_path) if plot_path else None
    for path in filter(None, (json_path, csv_path, plot_path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if no_plot:
        console.print(f"[yellow]![/] {no_plot}")
    result = measure_all(options, console, keep=(lambda so_far: save_json(so_far, json_path)) if json_path else None)
    if json_path:  # before the table: what is measured is safe
        save_json(result, json_path)
    render(result, console)
    if csv_path:
        save_csv(result, csv_path)
    if plot_path and not no_plot:
        draw(result, plot_path)
    if result["stopped"]:
        raise typer.Exit(130)
    return bool(result["ok"])
