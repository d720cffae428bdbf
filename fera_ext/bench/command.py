"""The `fera-ext bench` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fera_ext.bench import OPERATORS, WHOLE, variants

BAND_VARIANTS, LINEAR_VARIANTS = (", ".join(variants(name)[1]) for name in ("band_energy", "expert_linear"))
NAMES = OPERATORS | WHOLE
LISTED = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
ROUNDS = 20
OF_A_STEP = ("models", "batch", "contenders", "modes", "attention", "sampling")


def bench(
    operator: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}. {LISTED}.")],
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
        typer.Option(help="Linears and step alone: experts x rank, by default 3x4,4x32,8x64; step: 3x4."),
    ] = None,
    masters: Annotated[
        bool, typer.Option("--masters", help="Linears alone: adapters in float32, whatever the dtype.")
    ] = False,
    passes: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates it)
        typer.Option(help="Of forward, backward, step, by default those it has; for step of step, sampling."),
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
        typer.Option(help="float32 (the default for latents), bfloat16 (for linears and step) or float16."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    variant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help=f"Forces a kernel variant: {BAND_VARIANTS}; for linears {LINEAR_VARIANTS} (all, the default: a row "
            "for each)."
        ),
    ] = None,
    models: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates it)
        typer.Option(
            help="Step alone: of sdxl, sd15, flux (2 of 19 and 4 of 38 blocks), svd, all on a GPU; tiny-sdxl and the "
            "like, all on a CPU."
        ),
    ] = None,
    batch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Step alone: samples a step, by default 1,4 on a GPU, 1 on a CPU."),
    ] = None,
    contenders: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Step alone: of forward, frozen, peft, peft-bf16, published, fera, fera-bf16, fera+fecl (the "
            "default), published+fecl, fera-autocast, peft-tensors."
        ),
    ] = None,
    modes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Step alone: of eager, graph, compiled; by default eager,graph, on a CPU eager."),
    ] = None,
    attention: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Step alone: which of torch's flash, efficient, math, cudnn may serve attention; default all."
        ),
    ] = None,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Step alone: sampling loops too, as --passes step,sampling.")
    ] = False,
    rounds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=3, help="Samples of each time, by default 20, for step 8; operators' contenders take turns."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Two shapes, two definitions, nothing compiled; for step two models, batch 1."),
    ] = False,
    compile_seconds: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0,
            help="Once torch.compile has used this much, later cases go without it; 45, or no limit beside --budget "
            "and for step.",
        ),
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0,
            help="Seconds for the whole run: where it would take longer, torch.compile is left out; of step what "
            "comes last too.",
        ),
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

    step: whole training steps beside the frozen model, PEFT's LoRA and the
    published pattern, eager, as one CUDA graph, compiled: milliseconds, peak
    memory, samples a second.
    """
    import os

    if operator not in NAMES:
        _fail(f"operator must be one of {', '.join(NAMES)}, got {operator!r}")
    variable, known = variants(operator)
    if variant is not None and operator in OPERATORS and variant not in known:
        _fail(f"variant must be one of {', '.join(known)}, got {variant!r}")
    if variant is not None and variant != "all" and operator in OPERATORS:
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
        "models": models,
        "batch": batch,
        "contenders": contenders,
        "modes": modes,
        "attention": attention,
        "sampling": sampling,
        "rounds": rounds,
        "quick": quick,
        "compile_seconds": compile_seconds,
        "budget": budget,
        "variant": variant,
    }
    for name in () if operator in WHOLE else OF_A_STEP:
        value = asked.pop(name)
        if value not in (None, False):
            _fail(f"{name} must be left out for {operator}, got {value!r}")
    if operator in OPERATORS:
        asked["variant"] = variant or os.environ.get(variable) or None
        asked["rounds"] = rounds or ROUNDS
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
    from fera_ext.bench.report import save_csv, save_json, why_no_plot

    measure_all, render, draw = _measuring(operator, asked)
    no_plot = why_no_plot(plot_path) if plot_path else None
    for path in filter(None, (json_path, csv_path, plot_path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if no_plot:
        console.print(f"[yellow]![/] {no_plot}")
    result = measure_all(console, keep=(lambda so_far: save_json(so_far, json_path)) if json_path else None)
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


def _measuring(operator: str, asked: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What measures, what prints the result and what draws it."""
    from functools import partial

    if operator in WHOLE:
        from fera_ext.bench import step, step_report
        from fera_ext.bench.step_options import StepOptions

        return partial(step.measure_all, StepOptions.parse(**asked)), step_report.render, step_report.draw
    from fera_ext.bench import report, runner
    from fera_ext.bench.cases import Options

    return partial(runner.measure_all, Options.parse(operator, **asked)), report.render, report.draw
