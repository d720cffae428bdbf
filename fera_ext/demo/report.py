"""The demo's outcome: who won, the table's rows, the HTML page, the figures as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from fera_ext.demo.charts import Line, line_chart, picture_grid, smooth
from fera_ext.demo.experiment import (
    BATCH,
    CONFIG,
    EVALUATED,
    LEARNING_RATE,
    MAX_NORM,
    SAMPLING_STEPS,
    Evaluation,
    Sampling,
    Training,
)

LEVEL_NAMES = ("little noise", "medium noise", "much noise")
FERA, LORA = 0, 1
"""Line styles: a method looks the same in every chart."""

SMALL_GAP = 0.02
"""Relative differences of the held-out loss below this one have changed sign from seed to seed."""


@dataclass
class Outcome:
    """All that the demo measured.

    Attributes:
        seed: of the draws.
        steps: of each fine-tuning.
        device: where it ran, in words.
        seconds: wall time of the whole demo.
        before: the evaluation of the base model.
        trainings: by method, "LoRA" and "FeRA".
        samplings: by model, "before", "LoRA" and "FeRA".
        reloaded: with the saved adapter in a fresh model.
        adapter_bytes: size of the saved adapter.
        train_patches: (N, H, W, 3) uint8, real patches the adapters were trained on.
    """

    seed: int
    steps: int
    device: str
    seconds: float
    before: Evaluation
    trainings: dict[str, Training]
    samplings: dict[str, Sampling]
    reloaded: Sampling
    adapter_bytes: int
    train_patches: np.ndarray

    @property
    def reload_error(self) -> float:
        """The largest difference between the samples before saving and after loading."""
        return float((self.samplings["FeRA"].raw - self.reloaded.raw).abs().max())

    def final(self, method: str) -> Evaluation:
        """A method's evaluation after its last step."""
        final = self.trainings[method].final
        assert final is not None
        return final

    def verdict(self) -> str:
        """One sentence on the held-out loss, whoever it favours."""
        fera, lora, base = self.final("FeRA").mean, self.final("LoRA").mean, self.before.mean
        gap = abs(fera - lora) / max(fera, lora)
        winner, loser = ("FeRA", "LoRA") if fera < lora else ("LoRA", "FeRA")
        ratio = self.trainings["FeRA"].seconds / self.trainings["LoRA"].seconds
        cost = f"A step of FeRA took {ratio:.2f} times as long as one of LoRA"
        cost += "; its consistency loss runs the base model too." if ratio > 1 else "."
        if min(fera, lora) >= base:
            return f"Neither helped: the held-out loss is not below the base model's. {cost}"
        if gap < 0.002:
            return f"A draw: the held-out losses are within {gap:.2%}. {cost}"
        doubt = " So small a gap may turn round with another seed." if gap < SMALL_GAP else ""
        return f"{winner} won: its held-out loss is {gap:.1%} below {loser}'s.{doubt} {cost}"

    def rows(self) -> list[list[str]]:
        """The table: method, held-out loss, change, its three levels, time per step, parameters."""
        rows = []
        for name in ("before", "LoRA", "FeRA"):
            training = self.trainings.get(name)
            result = self.final(name) if training else self.before
            change = f"{result.mean / self.before.mean - 1:+.1%}" if training else ""
            time = f"{training.seconds * 1e3:.0f} ms" if training else ""
            size = f"{training.parameters:,}" if training else ""
            levels = [f"{v:.4f}" for v in result.by_level]
            rows.append([name, f"{result.mean:.4f}", change, *levels, time, size])
        return rows

    def figures(self) -> dict[str, Any]:
        """Every number, ready for JSON."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "device": self.device,
            "seconds": self.seconds,
            "held_out_loss": {"before": self.before.mean, **{k: self.final(k).mean for k in self.trainings}},
            "held_out_loss_by_noise": {
                "before": self.before.by_level,
                **{k: self.final(k).by_level for k in self.trainings},
            },
            "seconds_per_step": {k: t.seconds for k, t in self.trainings.items()},
            "parameters": {k: t.parameters for k, t in self.trainings.items()},
            "losses": {k: t.losses for k, t in self.trainings.items()},
            "curve": {k: t.curve for k, t in self.trainings.items()},
            "energies": {k: s.energies for k, s in self.samplings.items()},
            "gates": self.samplings["FeRA"].gates,
            "reload_error": self.reload_error,
            "adapter_bytes": self.adapter_bytes,
            "verdict": self.verdict(),
        }


COLUMNS = ("", "held-out loss", "change", *LEVEL_NAMES, "time per step", "parameters")


def write(outcome: Outcome, folder: Path) -> Path:
    """Write ``report.html`` and ``results.json`` into ``folder``; the page's path.

    Raises:
        OSError: they cannot be written.
    """
    template = Template((Path(__file__).parent / "template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        setting=escape(_setting(outcome)),
        verdict=escape(outcome.verdict()),
        table=_table(outcome),
        samples=_samples(outcome),
        curves=_curves(outcome),
        routing=_routing(outcome),
        reload=_reload(outcome),
        details=escape(_details(outcome)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    for target, text in ((path, page), (folder / "results.json", json.dumps(outcome.figures(), indent=1))):
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    return path


def _setting(outcome: Outcome) -> str:
    return (
        f"{outcome.steps} steps of {BATCH} patches each, the same patches, noise and learning rate for both; "
        f"{outcome.device}, {outcome.seconds:.0f} seconds in all, seed {outcome.seed}."
    )


def _details(outcome: Outcome) -> str:
    c = CONFIG
    return (
        f"FeRA: {c.num_experts} experts of rank {c.rank}, {c.bands.name} bands ({c.bands.count}), "
        f"consistency loss weighted {c.fecl_weight:g}. LoRA: the same layers, at least as many parameters, "
        "router included. "
        f"AdamW, peak learning rate {LEARNING_RATE:g}, gradients clipped to {MAX_NORM:g}. Held-out loss: "
        f"squared error of the predicted velocity on {EVALUATED} patches from parts of the photographs that "
        "training never sees, at fixed noise, evenly over the timesteps. "
        f"Sampling: DDIM, {SAMPLING_STEPS} steps."
    )


def _table(outcome: Outcome) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in COLUMNS)
    rows = outcome.rows()
    losses = [float(row[1]) for row in rows]
    body = []
    for row, loss in zip(rows, losses):
        cells = "".join(
            f"<td{' class=best' if i == 1 and loss == min(losses) else ''}>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        body.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _figure(content: str, title: str, text: str) -> str:
    return f"<figure>{content}<figcaption><b>{escape(title)}</b> {escape(text)}</figcaption></figure>"


def _samples(outcome: Outcome) -> str:
    panels = [
        ("Real patches", "what both adapters were trained on", outcome.train_patches),
        ("Before", "the base model", outcome.samplings["before"].images),
        ("LoRA", f"after {outcome.steps} steps", outcome.samplings["LoRA"].images),
        ("FeRA", f"after {outcome.steps} steps", outcome.samplings["FeRA"].images),
    ]
    return "".join(_figure(picture_grid(images, title), title, text) for title, text, images in panels)


def _curves(outcome: Outcome) -> str:
    lora, fera = outcome.trainings["LoRA"], outcome.trainings["FeRA"]
    held_out = line_chart([Line("LoRA", lora.curve, LORA), Line("FeRA", fera.curve, FERA)], "step", "held-out loss")
    width = max(1, outcome.steps // 8)
    training = line_chart(
        [Line("LoRA", smooth(lora.losses, width), LORA), Line("FeRA", smooth(fera.losses, width), FERA)],
        "step",
        "training loss",
    )
    return _figure(held_out, "Held-out patches.", "The same noise and timesteps at every point.") + _figure(
        training, "Training patches.", f"Squared error, mean over the last {width} steps."
    )


def _routing(outcome: Outcome) -> str:
    run = outcome.samplings["FeRA"]
    names = _band_names(len(run.energies[0]))
    energies = [
        Line(name, [(i + 1.0, row[k]) for i, row in enumerate(run.energies)], k) for k, name in enumerate(names)
    ]
    gates = [
        Line(f"expert {m + 1}", [(i + 1.0, row[m]) for i, row in enumerate(run.gates)], m)
        for m in range(len(run.gates[0]))
    ]
    return _figure(
        line_chart(energies, "denoising step", "share of the latent's energy", from_zero=True),
        "Band energies.",
        "Mean over the samples.",
    ) + _figure(
        line_chart(gates, "denoising step", "gate", from_zero=True),
        "Gates.",
        "Mean over the samples; one gate serves all adapted layers of a step.",
    )


def _band_names(count: int) -> list[str]:
    if count == 3:
        return ["low band", "middle band", "high band"]
    return [f"band {k + 1}" for k in range(count)]


def _reload(outcome: Outcome) -> str:
    size = f"{outcome.adapter_bytes / 1024:.0f} KiB"
    if outcome.reload_error == 0.0:
        result = "the samples are the same, bit for bit"
    else:
        result = f"the samples differ by at most {outcome.reload_error:.1e}"
    return (
        f"The adapter was saved ({size} of safetensors), loaded into a fresh model with "
        f"<code>load_adapter</code> and sampled with routing at inference time: {result}."
    )
