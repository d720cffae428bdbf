"""The arguments of `fera-ext bench step`."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

from fera_ext.bench.cases import one_of, parse_experts, pick_device
from fera_ext.bench.step_contenders import CONTENDERS, DEFAULT
from fera_ext.bench.step_measure import SAMPLING_STEPS
from fera_ext.bench.step_models import CLASSES, CONFIGS, MODELS, TINY_MODELS, family

PASSES = ("step", "sampling")
MODES = ("eager", "graph", "compiled")
ATTENTION = ("flash", "efficient", "math", "cudnn")
ROUNDS, QUICK_ROUNDS = 8, 4


@dataclass(frozen=True)
class StepOptions:
    """What one run does; :meth:`parse` reads it from the command's arguments.

    Attributes:
        compile_seconds: once torch.compile has used them, later contenders go without it.
        budget: seconds for the run: compiling goes first, then whatever comes last. None: no limit.
        sampling_steps: of a sampling loop.
        attention: the backends that may serve ``scaled_dot_product_attention``; none: as torch chooses.
    """

    device: torch.device
    dtype: torch.dtype
    passes: tuple[str, ...]
    models: tuple[str, ...]
    batches: tuple[int, ...]
    experts: tuple[tuple[int, int], ...]
    contenders: tuple[str, ...]
    modes: tuple[str, ...]
    rounds: int = ROUNDS
    compile_seconds: float = math.inf
    budget: float | None = None
    sampling_steps: int = SAMPLING_STEPS
    attention: tuple[str, ...] = ()

    @staticmethod
    def parse(
        *,
        models: str | None = None,
        batch: str | None = None,
        experts: str | None = None,
        contenders: str | None = None,
        modes: str | None = None,
        attention: str | None = None,
        passes: str | None = None,
        sampling: bool = False,
        dtype: str | None = None,
        device: str = "auto",
        rounds: int | None = None,
        quick: bool = False,
        compile_seconds: float | None = None,
        budget: float | None = None,
        **others: Any,
    ) -> StepOptions:
        """Options from the command's strings; ``others`` are options that a step does not have.

        Raises:
            ValueError: an argument that is none of those allowed; the message names them.
            ImportError: diffusers is not installed.
        """
        for name, value in others.items():
            if value not in (None, False, "default"):
                raise ValueError(f"{name} must be left out for step, got {value!r}")
        if importlib.util.find_spec("diffusers") is None:
            raise ImportError("diffusers must be installed for step (pip install diffusers)")
        where = pick_device(device)
        on_gpu = where.type == "cuda"
        taken = _several("passes", passes or "step", PASSES)
        if sampling and "sampling" not in taken:
            taken = (*taken, "sampling")
        usual = MODELS if on_gpu else TINY_MODELS
        chosen = _several("models", models, tuple(CONFIGS)) if models else (usual[:2] if quick else usual)
        if "sampling" in taken and not any(has_sampling(name) for name in chosen):
            raise ValueError(f"models must have an sdxl or sd15 for sampling, got {','.join(chosen)!r}")
        possible = MODES if on_gpu else tuple(m for m in MODES if m != "graph")
        if compile_seconds is None:
            compile_seconds = math.inf
        kind = one_of("dtype", dtype or "bfloat16", ("float32", "bfloat16"))
        return StepOptions(
            where,
            getattr(torch, kind),
            taken,
            chosen,
            parse_batches(batch or ("1" if quick or not on_gpu else "1,4")),
            parse_experts(experts or "3x4"),
            _several("contenders", contenders, tuple(CONTENDERS)) if contenders else DEFAULT,
            _several("modes", modes, possible) if modes else possible[: 2 if on_gpu else 1],
            rounds or (QUICK_ROUNDS if quick else ROUNDS),
            compile_seconds,
            budget,
            attention=_several("attention", attention, ATTENTION) if attention else (),
        )


def _several(name: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one_of(name, part, allowed) for part in text.split(",")))


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,4`` to numbers.

    Raises:
        ValueError: no positive numbers.
    """
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"batch must be positive numbers like 1,4, got {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))


def has_sampling(model: str) -> bool:
    """Whether there is a sampling loop for a model."""
    return CLASSES[family(model)] == "UNet2DConditionModel"
