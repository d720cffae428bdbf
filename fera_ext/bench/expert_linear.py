"""expert_linear on the bench: forward, and the step to x, A, B and gate, beside the frozen linear alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

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
from fera_ext.bench.peers_expert import (
    SCALE,
    Layer,
    Together,
    frozen,
    parts,
    peft_lora,
    plain,
    published,
    separately,
)
from fera_ext.bench.shapes import LINEAR_GOALS, Shape, linear_name

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
                groups, tokens, width, out, linears = sizes(shape)
                goals = LINEAR_GOALS.get(shape, {}) if pass_name == "step" and options.dtype == torch.bfloat16 else {}
                least, flops = work(pass_name, shape, experts * rank, options.dtype.itemsize)
                yield Case(
                    options.operator,
                    linear_name(shape),
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
                        "linears": linears,
                        "gate_rows": groups,
                        "experts": f"{experts}x{rank}",
                    },
                )


def sizes(shape: Shape) -> tuple[int, int, int, int, int]:
    """(gate rows, tokens of each, in, out, linears that share the input)"""
    groups, tokens, width, out, *group = shape
    return groups, tokens, width, out, group[0] if group else 1


def work(pass_name: str, shape: Shape, stacked: int, itemsize: int) -> tuple[int, int]:
    """(least bytes, FLOPs) of a pass with T tokens and stacked rank R; R = 0 is the frozen linear alone.

    Forward: T·in + in·out + T·out + T·R numbers and 2·T·in·out + 2·T·R·(in + out) FLOPs. Backward: T·out +
    in·out + 2·T·in + T·R (x is not read where R = 0) and 2·T·in·out + 4·T·R·(in + out). Of n linears on one input
    all is n-fold but the T·in.
    """
    groups, tokens, width, out, linears = sizes(shape)
    total = groups * tokens
    numbers = total * width + linears * (width * out + total * out + total * stacked)
    flops = linears * (2 * total * width * out + 2 * total * stacked * (width + out))
    if pass_name == "step":
        numbers += (2 if stacked else 1) * total * width + linears * (total * out + width * out + total * stacked)
        flops += linears * (2 * total * width * out + 4 * total * stacked * (width + out))
    return numbers * itemsize, flops


def layer(session: Session, shape: Shape, experts: int, rank: int) -> Layer:
    """Frozen weights, x and dy (one set a shape, shared by its cases), adapters and gate, all random."""
    groups, tokens, width, out, linears = sizes(shape)
    device, dtype = session.device, session.dtype

    def drawn(seed: int, *size: int, by: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randn(size, generator=generator, device=device) * by).to(to)

    def several(seed: int, *size: int, **how: Any) -> tuple[Tensor, ...]:
        return tuple([drawn(seed + 10 * i, *size, **how) for i in range(linears)])

    def base() -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        weights = several(1, out, width, by=1 / math.sqrt(width))
        return drawn(0, groups, tokens, width), weights, several(2, groups, tokens, out)

    x, weights, dys = session.shared(("linear", shape), base)
    held = torch.float32 if session.options.masters else dtype
    lora_as = several(3, experts, rank, width, by=1 / math.sqrt(width), to=held)
    lora_bs = several(4, out, experts, rank, by=1 / math.sqrt(rank), to=held)
    gate = torch.softmax(drawn(5, groups, experts, to=torch.float32), dim=1)
    return Layer(x, gate, weights, lora_as, lora_bs, dys)


def operator(linears: int) -> tuple[Together, str]:
    """The operator on so many linears, and its form: the grouped operator where there is one."""
    from fera_ext import ops

    grouped: Callable[..., list[Tensor]] | None = getattr(ops, "expert_linear_group", None)
    if linears == 1 or grouped is None:

        def linear(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
            return ops.expert_linear(x, weight, None, lora_a, lora_b, gate, SCALE)

        return separately(linear), "" if linears == 1 else f"{linears} calls of expert_linear"

    def group(x: Tensor, gate: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, lora_as, lora_bs = (list(each) for each in zip(*parts(tensors)))
        return tuple(grouped(x, weights, [None] * linears, lora_as, lora_bs, gate, SCALE))

    return group, "expert_linear_group"


def _bound(pass_name: str, shape: Shape, experts: int, rank: int) -> Callable[[Session], Iterable[Contender | Absent]]:
    return lambda session: _build(session, pass_name, shape, experts, rank)


def _build(session: Session, pass_name: str, shape: Shape, experts: int, rank: int) -> Iterator[Contender | Absent]:
    made = layer(session, shape, experts, rank)
    ours, form = operator(len(made.weights))
    variable, (_, first, *forced) = variants("expert_linear")
    asked = session.options.variant
    names = {OURS: asked} if asked != "all" else {OURS: first, **{f"{OURS}:{v}": v for v in forced}}
    for name, variant in names.items():
        more: dict[str, Any] = {"environment": {variable: variant}, "form": form}
        yield differentiable(name, ours, made.arguments, made.leaves, pass_name, made.dys, **more)
    yield frozen(made, pass_name, work(pass_name, shape, 0, session.dtype.itemsize))
    yield from plain(session, made, pass_name)
    yield published(made, pass_name)
    yield peft_lora(session, made, pass_name)
