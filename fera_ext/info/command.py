"""The `fera-ext info` command."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which kernel variant runs for which latent, and why.")
    ] = False,
) -> None:
    """Says how this copy was built, what it found, whether every operator works, and what to do when not.

    Exit status 1 when the extension does not load or an operator disagrees with its plain PyTorch twin.
    """
    from fera_ext.info.report import collect, render

    report = collect(explain=explain)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        render(report)
    raise typer.Exit(0 if report["ok"] else 1)
