"""What the demo shows on the terminal: an introduction, progress bars, the table."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fera_ext.demo.experiment import CONFIG, SAMPLING_STEPS, Experiment, Methods, Tick
from fera_ext.demo.report import COLUMNS, Outcome


def introduce(console: Console, steps: int, device: torch.device) -> None:
    """Say what is about to happen."""
    console.print(
        Panel.fit(
            "A small diffusion model that knows everyday photographs learns two others, galaxies and stained "
            f"tissue:\nonce with [bold]FeRA[/] ({CONFIG.num_experts} experts of rank {CONFIG.rank}, routed "
            "by frequency), once with [bold]plain LoRA[/] of the same size.\n"
            f"{steps} steps each, same patches, same noise, same learning rate, on {describe(device)}.",
            title="fera-ext demo",
            border_style="cyan",
        )
    )


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"the CPU with {count} thread{'s' if count > 1 else ''}"


def tracked(console: Console, output_dir: Path, steps: int, seed: int, device: torch.device) -> Outcome:
    """Run the experiment under progress bars; the adapter is saved into ``output_dir``."""
    bars = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figure]}"),
        console=console,
    )
    with bars:
        plan = [
            ("samples before", SAMPLING_STEPS),
            ("fine-tuning both", steps),
            ("LoRA: samples", SAMPLING_STEPS),
            ("FeRA: samples", SAMPLING_STEPS),
            ("FeRA: loaded again", SAMPLING_STEPS),
        ]
        methods: Methods = {}
        tasks = {name: bars.add_task(name, total=total, figure="", start=False) for name, total in plan}

        def ticker(name: str) -> Tick:
            task: TaskID = tasks[name]
            bars.start_task(task)

            def tick(losses: list[float]) -> None:
                figure = "  ".join(f"{name} {loss:.3f}" for name, loss in zip(methods, losses))
                bars.update(task, advance=1, figure=figure)

            return tick

        experiment = Experiment(seed, device)
        fera_model, lora_model = experiment.new_model(), experiment.new_model()
        before = experiment.evaluate(fera_model)
        samplings = {"before": experiment.sample(fera_model, None, ticker("samples before"))}
        fera = experiment.new_fera(fera_model)
        lora = experiment.new_lora(lora_model, fera)
        methods.update(LoRA=(lora_model, lora), FeRA=(fera_model, fera))
        trainings = experiment.finetune(methods, steps, ticker("fine-tuning both"))
        samplings["LoRA"] = experiment.sample(lora_model, None, ticker("LoRA: samples"))
        samplings["FeRA"] = experiment.sample(fera_model, fera, ticker("FeRA: samples"))
        saved = Path(fera.save(output_dir / "adapter"))
        reloaded = experiment.reload_and_sample(saved.parent, ticker("FeRA: loaded again"))
    return Outcome(
        seed=seed,
        steps=steps,
        device=describe(device),
        seconds=0.0,
        before=before,
        trainings=trainings,
        samplings=samplings,
        reloaded=reloaded,
        adapter_bytes=saved.stat().st_size,
        train_patches=experiment.patches(held_out=False),
    )


def results(console: Console, outcome: Outcome, report: Path) -> None:
    """The table, who won, and where the report is."""
    table = Table(title="Held-out loss: squared error on patches that training never saw", title_style="bold")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right")
    rows = outcome.rows()
    best = min(float(row[1]) for row in rows)
    for row in rows:
        table.add_row(row[0], f"[bold]{row[1]}[/]" if float(row[1]) == best else row[1], *row[2:])
    console.print(table)
    console.print(outcome.verdict(), highlight=False)
    exact = "bit for bit" if outcome.reload_error == 0.0 else f"to {outcome.reload_error:.1e}"
    console.print(f"The saved adapter, loaded into a fresh model, samples the same {exact}.", highlight=False)
    console.print(f"{outcome.seconds:.0f} s in all. Report: [bold]{report}[/]", highlight=False)
