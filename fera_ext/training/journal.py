"""The run's log: one JSON line a step, a progress bar, and the trackers."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fera_ext.training.errors import TrainError, first_line, saving_failed

FILE_NAME = "log.jsonl"


class Journal:
    """Writes what happened; on the main process only.

    Args:
        output_dir: where ``log.jsonl`` is.
        first: the steps already done; later lines, of a run that went on without being saved, are dropped.
        last: the step to reach.
        active: whether this is the main process.
        tracker: called with (values, step) for every step, such as ``Accelerator.log``.
        console: where the progress goes; a bar on a terminal, a few lines elsewhere.
    """

    def __init__(self, output_dir: Path, first: int, last: int, active: bool, tracker: Any, console: Console) -> None:
        self.path = output_dir / FILE_NAME
        self.first, self.last = first, last
        self.active = active
        self.tracker = tracker
        self.console = console
        self.every = max(1, last // 20)
        self._stream: TextIO | None = None
        self._tracking = True
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not active or not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=last, completed=first, figures="")

    def __enter__(self) -> Journal:
        if self.active:
            try:
                kept = []
                if self.path.is_file():
                    lines = self.path.read_text().splitlines()
                    kept = [line for line in lines if _step(line) <= self.first]
                self._stream = open(self.path, "w")
                self._stream.writelines(line + "\n" for line in kept)
                self._stream.flush()
            except OSError as error:
                raise saving_failed("the log", self.path, error) from error
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
        if self._stream is not None:
            self._stream.close()

    def _track(self, values: dict[str, float], step: int) -> None:
        """Pass a step's figures on; a tracker that fails is not worth the training, and is left alone from then on."""
        if self._tracking:
            try:
                self.tracker(values, step)
            except Exception as error:  # trackers' errors have no common class
                self._tracking = False
                warnings.warn(f"tracking ends at step {step}: {first_line(error)}", stacklevel=3)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Note a step's figures.

        Raises:
            TrainError: the log cannot be written, or the loss is not finite.
        """
        if self.active and self._stream is not None:
            try:
                self._stream.write(json.dumps({"step": step, **values}) + "\n")
                self._stream.flush()
            except OSError as error:
                raise saving_failed("the log", self.path, error) from error
            figures = f"loss {values['loss']:.4f}  lr {values['lr']:.1e}"
            self._bar.update(self._task, completed=step, figures=figures)
            if not self.console.is_terminal and (step % self.every == 0 or step == self.last):
                self.console.print(f"step {step}/{self.last}  {figures}", highlight=False)
        self._track(values, step)
        if not math.isfinite(values["loss"]):
            raise TrainError(
                f"loss must be finite, got {values['loss']} at step {step}; "
                "a lower learning_rate or bf16 instead of fp16 may help"
            )


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
