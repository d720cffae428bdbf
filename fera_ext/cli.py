"""The `fera-ext` command. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

import typer

from fera_ext.bench.command import bench
from fera_ext.demo.command import demo
from fera_ext.info.command import info
from fera_ext.training.command import CONTEXT, train

app = typer.Typer(
    name="fera-ext",
    help="FeRA on hand-written C++/CUDA kernels: train adapters, see a demo, check the build, time it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(info)
app.command()(demo)
app.command()(bench)
app.command(context_settings=CONTEXT)(train)


def main() -> None:
    """Entry point of the console script and of ``python -m fera_ext``."""
    app()
