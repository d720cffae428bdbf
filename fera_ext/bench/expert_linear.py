"""expert_linear on the bench: forward, and the step to x, A, B and gate, beside the frozen linear alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fera_ext.bench import variants
from fera_ext.bench.cases import (
    OURS,
    Absent,
    Case,
    Contender,
    Options,
    chosen_passes,
    differentiable,
)
from fera_ext.bench.peers_expert import SCALE, Layer, frozen, peft_lora, plain, published
from fera_ext.bench.shapes import LINEAR_GOALS, Shape

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative error between contenders. Each rounds hidden and outputs of its own once or more: a few times
2^-9 in bfloat16, 2^-12 in float16."""


def cases(options: Options) -> Iterator[Case]:
    """The cases, steps first and small ranks first: what torch.compile's seconds are spent on."""
    for pass_name in chosen_passes(options, ("step", "forward")):
        for experts, rank in options.experts:
            for shape in options.shapes:
                groups, tokens, width, out = shape
                goals = LINEAR_GOALS.get(shape, {}) if pass_name == "step" and options.dtype == torch.bfloat16 else {}
                least, flops = work(pass_name, shape, experts * rank, options.dtype.itemsize)
                yield Case(
                    options.operator,
                    "x".join(map(str, shape)),
                    "",
                    pass_name,
                    least,
                    _bound(pass_name, shape, experts, rank),
                    least_flops=flops,
                    goal_ratio=goals.get(experts * rank),
                    limit=LIMITS[options.dtype],
                    fields={
                        "tokens": groups * tokens,
                        "in": width,
                        "out": out,
                        "gate_rows": groups,
                        "experts": f"{experts}x{rank}",
                    },
                )


def work(pass_name: str, shape: Shape, stacked: int, itemsize: int) -> tuple[int, int]:
    """(least bytes, FLOPs) of a pass with T tokens and stacked rank R; R = 0 is the frozen linear alone.

    Forward: T·in + in·out + T·out + T·R numbers and 2·T·in·out + 2·T·R·(in + out) FLOPs. Backward: T·out +
    in·out + 2·T·in + T·R (x is not read where R = 0) and 2·T·in·out + 4·T·R·(in + out).
    """
    groups, tokens, width, out = shape
    total = groups * tokens
    numbers = total * width + width * out + total * out + total * stacked
    flops = 2 * total * width * out + 2 * total * stacked * (width + out)
    if pass_name == "step":
        numbers += total * out + width * out + (2 if stacked else 1) * total * width + total * stacked
        flops += 2 * total * width * out + 4 * total * stacked * (width + out)
    return numbers * itemsize, flops


def layer(session: Session, shape: Shape, experts: int, rank: int) -> Layer:
    """A frozen weight, x and dy (one a shape, shared by its cases), adapters and gate, all random."""
    groups, tokens, width, out = shape
    device, dtype = session.device, session.dtype

    def drawn(seed: int, *sizes: int, by: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn(sizes, generator=generator, device=device) * by).to(to)

    def base() -> tuple[Tensor, Tensor, Tensor]:
        weight = drawn(1, out, width, by=1 / math.sqrt(width))
        return drawn(0, groups, tokens, width), weight, drawn(2, groups, tokens, out)

    x, weight, dy = session.shared(("linear", shape), base)
    held = torch.float32 if session.options.masters else dtype
    lora_a = drawn(3, experts, rank, width, by=1 / math.sqrt(width), to=held)
    lora_b = drawn(4, out, experts, rank, by=1 / math.sqrt(rank), to=held)
    gate = torch.softmax(drawn(5, groups, experts, to=torch.float32), dim=1)
    return Layer(x, weight, lora_a, lora_b, gate, dy)


def _bound(pass_name: str, shape: Shape, experts: int, rank: int) -> Callable[[Session], Iterable[Contender | Absent]]:
    return lambda session: _build(session, pass_name, shape, experts, rank)


def _build(session: Session, pass_name: str, shape: Shape, experts: int, rank: int) -> Iterator[Contender | Absent]:
    from fera_ext import ops

    made = layer(session, shape, experts, rank)

    def ours(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
        return ops.expert_linear(x, weight, None, lora_a, lora_b, gate, SCALE)

    variable, (_, first, *forced) = variants("expert_linear")
    asked = session.options.variant
    names = {OURS: asked} if asked != "all" else {OURS: first, **{f"{OURS}:{v}": v for v in forced}}
    for name, variant in names.items():
        yield differentiable(
            name, ours, made.arguments, made.leaves, pass_name, made.dy, environment={variable: variant}
        )
    yield frozen(made, pass_name, work(pass_name, shape, 0, session.dtype.itemsize))
    yield from plain(session, made, pass_name)
    yield published(made, pass_name)
    yield peft_lora(session, made, pass_name)
