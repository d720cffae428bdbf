"""Checkpoints on disk: a folder each, whole or not there at all.

``checkpoint-<step>`` holds ``fera_adapter.safetensors``, ``training_state.pt`` (optimizer, schedule and
gradient scaler; plain tensors and numbers) and ``state.json`` (the step, the settings that the losses
depend on). It is written beside its place and renamed: a crash or a full disk leaves the others intact.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fera_ext.adapter import FeraAdapter
from fera_ext.training.errors import TrainError, UsageError, first_line, saving_failed

STATE_FILE = "state.json"
TENSOR_FILE = "training_state.pt"
ADDED = {"fecl_every": 1, "fecl_share": 1.0}
"""Pinned settings that older checkpoints do not name, and what they were trained with."""

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, by step."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def locate(asked: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: a path, the name of one in ``output_dir``, or "latest" there.

    None means a new run: nothing was asked for, or "latest" where there is none yet.

    Raises:
        UsageError: no such checkpoint, or a new run would mix with the checkpoints of an older one.
    """
    present = checkpoints(output_dir)
    if asked is None:
        if present:
            raise UsageError(
                f"output_dir must hold no checkpoint of another run, got {present[-1]} "
                "(resume_from_checkpoint=latest continues it)"
            )
        return None
    if asked == "latest":
        return present[-1] if present else None
    for path in (Path(asked), output_dir / asked):
        if (path / STATE_FILE).is_file():
            return path
    raise UsageError(f"resume_from_checkpoint must be 'latest' or a checkpoint's folder, got {asked}")


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``.

    Raises:
        TrainError: it is missing or damaged.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text())
        return {"step": int(state["step"]), "pinned": {**ADDED, **state["pinned"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{path} must be a complete checkpoint, got {first_line(error)}") from error


def check_pinned(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Whether a run may continue a checkpoint.

    Raises:
        UsageError: settings that the losses depend on differ; they are named.
    """
    asked = json.loads(json.dumps(asked))
    different = [
        f"{name}={asked.get(name)!r} (there {saved.get(name)!r})"
        for name in sorted(set(saved) | set(asked))
        if saved.get(name) != asked.get(name)
    ]
    if different:
        raise UsageError(f"settings must be those of {path}, got {', '.join(different)}")


def read_tensors(path: Path) -> dict[str, Any]:
    """A checkpoint's optimizer, schedule and scaler states, on the CPU; loading them moves them.

    Raises:
        TrainError: the file is missing or damaged.
    """
    try:
        return torch.load(path / TENSOR_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise TrainError(f"{path} must be a complete checkpoint, got {first_line(error)}") from error


def save(
    output_dir: Path,
    step: int,
    adapter: FeraAdapter,
    tensors: Mapping[str, Any],
    pinned: Mapping[str, Any],
    limit: int | None,
) -> Path:
    """Write ``checkpoint-<step>``, then delete the oldest ones beyond ``limit``.

    Raises:
        TrainError: it cannot be written, because the disk is full, for one; nothing else is touched.
    """
    target = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        adapter.save(temporary)
        with open(temporary / TENSOR_FILE, "wb") as stream:
            torch.save(dict(tensors), stream)
            stream.flush()
            os.fsync(stream.fileno())
        (temporary / STATE_FILE).write_text(json.dumps({"step": step, "pinned": dict(pinned)}, indent=1))
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # torch's own writer turns a failed write into a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise saving_failed(f"checkpoint {step}", target, cause) from error
        raise TrainError(f"checkpoint {step} could not be saved to {target}: {first_line(error)}") from error
    if limit is not None:
        for old in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old, ignore_errors=True)
    return target
