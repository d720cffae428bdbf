"""The `fera-ext demo` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

STEPS = 160
RELOAD_TOLERANCE = 1e-5
"""Largest difference of samples in [-1, 1] after reloading; equal where products are deterministic."""


class DemoError(Exception):
    """What stopped the demo, in one line."""


def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the report and adapter go.")] = Path("fera-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Fine-tuning steps of each method.")] = STEPS,
    seed: Annotated[int, typer.Option(min=0, help="Of all random draws.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    open_report: Annotated[
        Optional[bool],  # noqa: UP045 (typer evaluates it)
        typer.Option("--open/--no-open", help="Open the report; by default from a terminal with a desktop."),
    ] = None,
) -> None:
    """Fine-tune a small diffusion model with FeRA and with plain LoRA, compare them, write a report.

    Everything ships with the package: no network, no GPU needed. Exit status 1 when something is missing or
    the saved adapter does not give the same samples again.
    """
    from rich.console import Console

    console = Console()
    try:
        report = _run(console, output_dir, steps, seed, device)
    except DemoError as error:
        typer.echo(f"fera-ext demo: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("fera-ext demo: stopped", err=True)
        raise typer.Exit(130) from None
    if open_report or (open_report is None and console.is_terminal and _has_desktop()):
        import webbrowser

        webbrowser.open(report.resolve().as_uri())


def _has_desktop() -> bool:
    import os
    import sys

    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _pick_device(asked: str) -> Any:
    """The device, if this build can use it.

    Raises:
        DemoError: an unknown device, or one that this machine or build lacks.
    """
    import torch

    from fera_ext._build_info import INFO

    usable = bool(torch.cuda.is_available() and INFO["operators_cuda"])
    if asked == "auto":
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise DemoError(f"device must be cpu, cuda or auto, got {asked!r}") from None
    if device.type == "cuda" and not usable:
        raise DemoError("device must be cpu without a GPU and a build with CUDA operators, got cuda")
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"device must be cpu, cuda or auto, got {asked!r}")
    return device


def _run(console: Any, output_dir: Path, steps: int, seed: int, asked: str) -> Path:
    """The demo; the report's path.

    Raises:
        DemoError: something is missing, cannot be written, or the adapter does not reload.
    """
    import time

    start = time.perf_counter()
    try:
        import diffusers
        import skimage  # noqa: F401
    except ImportError as error:
        raise DemoError(
            f"diffusers and scikit-image must be installed, got {error} (pip install 'fera-ext[demo]')"
        ) from error
    diffusers.utils.logging.set_verbosity_error()
    device = _pick_device(asked)
    from fera_ext.demo.report import write
    from fera_ext.demo.show import introduce, results, tracked

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        introduce(console, steps, device)
        outcome = tracked(console, output_dir, steps, seed, device)
        outcome.seconds = time.perf_counter() - start
        report = write(outcome, output_dir)
    except OSError as error:
        raise DemoError(f"{error.filename or output_dir}: {error.strerror or error}") from error
    results(console, outcome, report)
    if not outcome.reload_error <= RELOAD_TOLERANCE:
        raise DemoError(f"samples after reloading must be the same, got {outcome.reload_error:.1e} between them")
    return report
