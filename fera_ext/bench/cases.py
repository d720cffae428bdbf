"""What is timed: options, cases, contenders, and the band definitions of the benchmarks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fera_ext.bands import Bands
from fera_ext.bench import variants
from fera_ext.bench.shapes import EAGER_GOALS, GOALS, Shape, parse_linears, parse_shapes

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session

PEERS = ("torch", "compiled", "cufft", "published")
LINEAR_PEERS = ("frozen", "torch", "compiled", "published", "peft")
OURS = "fera_ext"
LIMIT = 1e-3
"""Largest relative error of a contender's answers against the operator's; more is an error of the benchmark."""

COMPILE_SECONDS = 45.0
"""What torch.compile may use in all, where the run has no budget."""

EXPERTS, HIDDEN, TAU = 3, 64, 0.7
"""The router of the latent_gate benchmarks."""


@dataclass(frozen=True)
class Options:
    """What one run of the benchmark does; :meth:`parse` reads it from the command's arguments.

    Attributes:
        compile_seconds: once torch.compile has used them, later cases go without it.
        budget: seconds the run should take; torch.compile goes first where it would take longer. None: no limit.
    """

    operator: str
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    bands: tuple[tuple[str, int], ...]
    passes: tuple[str, ...] | None
    peers: tuple[str, ...]
    experts: tuple[tuple[int, int], ...] = ()
    masters: bool = False
    variant: str = "auto"
    rounds: int = 20
    calls: int = 50
    batch_seconds: float = 1e-3
    compile_seconds: float = COMPILE_SECONDS
    budget: float | None = None

    @staticmethod
    def parse(
        operator: str,
        *,
        shapes: str = "default",
        bands: str | None = None,
        experts: str | None = None,
        masters: bool = False,
        passes: str | None = None,
        peers: str | None = None,
        dtype: str | None = None,
        device: str = "auto",
        variant: str | None = None,
        quick: bool = False,
        compile_seconds: float | None = None,
        budget: float | None = None,
        **rest: Any,
    ) -> Options:
        """Options from the command's strings; ``rest`` are fields as they are.

        Raises:
            ValueError: an argument that is none of those allowed; the message names them.
        """
        where = pick_device(device)
        linear = operator == "expert_linear"
        others = {"bands": bands} if linear else {"experts": experts, "masters": masters or None}
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} must be left out for {operator}, got {value!r}")
        if quick:
            shapes = "quick" if shapes == "default" else shapes
            bands, experts = bands or "dog,author", experts or "3x4,4x32"
            rest["rounds"] = min(rest.get("rounds", 10), 10)
        all_peers = LINEAR_PEERS if linear else PEERS
        chosen = _subset("peers", peers, all_peers)
        if chosen is None:
            chosen = tuple(p for p in all_peers if where.type == "cuda" or p not in ("compiled", "cufft"))
            chosen = tuple(p for p in chosen if not (quick and p == "compiled"))
        if compile_seconds is None:  # a budget is the better limit
            compile_seconds = COMPILE_SECONDS if budget is None else math.inf
        kind = one_of("dtype", dtype or ("bfloat16" if linear else "float32"), ("float32", "bfloat16", "float16"))
        return Options(
            operator,
            where,
            getattr(torch, kind),
            parse_linears(shapes) if linear else parse_shapes(shapes),
            () if linear else parse_bands(bands or "dog,rings,author,custom"),
            _subset("passes", passes, ("forward", "backward", "step")),
            chosen,
            parse_experts(experts or "3x4,4x32,8x64") if linear else (),
            masters,
            variant or variants(operator)[1][0],
            compile_seconds=compile_seconds,
            budget=budget,
            **rest,
        )


def one_of(name: str, got: str, allowed: Sequence[str]) -> str:
    """``got``.

    Raises:
        ValueError: it is none of those allowed; the message names them.
    """
    if got not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {got!r}")
    return got


def _subset(name: str, text: str | None, allowed: Sequence[str]) -> tuple[str, ...] | None:
    """Names out of a comma-separated list, in the order of ``allowed``; "none" is the empty one."""
    if text is None:
        return None
    wanted = [one_of(name, part, (*allowed, "none")) for part in text.split(",")]
    return tuple(a for a in allowed if a in wanted)


def pick_device(asked: str) -> torch.device:
    """``cpu`` or ``cuda``, or the GPU if there is one for ``auto``.

    Raises:
        ValueError: an unknown device, or cuda where this machine or build has none.
    """
    from fera_ext._build_info import INFO

    usable = bool(torch.cuda.is_available() and INFO["operators_cuda"])
    one_of("device", asked, ("cpu", "cuda", "auto"))
    if asked == "cuda" and not usable:
        raise ValueError("device must be cpu without a GPU and a build with CUDA operators, got 'cuda'")
    return torch.device("cuda" if usable and asked != "cpu" else "cpu")


def parse_experts(text: str) -> tuple[tuple[int, int], ...]:
    """``3x4,4x32`` to (E, r).

    Raises:
        ValueError: not two numbers, or a number of experts or an E·r that the operator does not take.
    """
    found = []
    for part in text.split(","):
        numbers = [int(n) if n.isascii() and n.isdigit() else 0 for n in part.split("x")]
        if len(numbers) != 2 or not 1 <= numbers[0] <= 32 or not 1 <= numbers[0] * numbers[1] <= 512:
            raise ValueError(f"experts must be like 3x4,8x64, 1 to 32 of them, E*r from 1 to 512, got {part!r}")
        found.append((numbers[0], numbers[1]))
    return tuple(dict.fromkeys(found))


def parse_bands(text: str) -> tuple[tuple[str, int], ...]:
    """``dog,author:4`` to names with their number of bands, 3 unless told.

    Raises:
        ValueError: an unknown definition or a number it does not take.
    """
    found = []
    for part in text.split(","):
        name, _, count = part.partition(":")
        if name not in ("dog", "rings", "author", "custom") or not (count or "3").isdigit():
            raise ValueError(f"bands must be of dog, rings, author, custom, or like dog:4, got {part!r}")
        made = make_bands((name, int(count or 3)), 4, 4)  # its own message for a count it does not take
        found.append((name, made.count))
    return tuple(dict.fromkeys(found))


def make_bands(definition: tuple[str, int], height: int, width: int) -> Bands:
    """The band definition for latents of ``height`` × ``width`` pixels."""
    name, count = definition
    if name != "custom":
        return Bands(name, (("K", count),))
    return Bands.custom(custom_masks(count, height, width))


def custom_masks(count: int, height: int, width: int) -> Tensor:
    """(K, H, W//2+1) float64 squared transfers that are no function of the radius alone: angular sectors of
    the plane of frequencies, |cos|-shaped, that sum to one."""
    fy = torch.fft.fftfreq(height, dtype=torch.float64).abs()
    fx = torch.fft.rfftfreq(width, dtype=torch.float64)
    angle = torch.atan2(fy[:, None].expand(height, len(fx)), fx[None, :].expand(height, len(fx)))
    place = angle / (0.5 * math.pi) * (count - 1)
    masks = torch.stack([(1 - (place - k).abs()).clamp_min(0) for k in range(count)])
    return masks


@dataclass
class Contender:
    """One implementation of one pass.

    Attributes:
        name: :data:`OURS`, the same with a forced variant (``fera_ext:tiles``), or one of the peers.
        run: one call on the current stream; returns the answers: the output, or the gradients, or both.
        form: which formulation it is, where there are several.
        captures: False for code no CUDA graph can hold.
        compiles: whether the first call compiles.
        comparable: False where the answers are others than the operator's by design; they are not checked.
        arrange: brings the answers into the operator's form, outside the clocks.
        work: (bytes, FLOPs) where it has less to do than the case says.
        environment: variables that stand while it runs, and are put back after.
    """

    name: str
    run: Callable[[], tuple[Tensor, ...]]
    form: str = ""
    captures: bool = True
    compiles: bool = False
    comparable: bool = True
    arrange: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    work: tuple[int, int] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The environment as the contender wants it."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def call(self) -> tuple[Tensor, ...]:
        """One run in its environment; for a clock, :meth:`applied` belongs outside."""
        with self.applied():
            return self.run()


@dataclass(frozen=True)
class Absent:
    """A contender that is not timed in a case, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    Attributes:
        operator: the operator's name.
        shape: what the rows are grouped by, such as ``4x4x64x64``, as ``--shapes`` takes it.
        bands: the band definition's name, such as ``dog(3)``; empty where there is none.
        pass_name: ``forward``, ``backward`` or ``step`` (forward and backward).
        least_bytes: what any implementation must read and write (of the latents); None: no floor.
        build: makes the contenders, ours first.
        goal_us, eager_goal_us: microseconds to stay under, where there is a goal.
        least_flops: FLOPs of the matrix products; None: not bound by products. Where given, calls may be long: a
            graph holds fewer of them, and there are fewer rounds; peak memory and ratios to ``frozen`` are taken.
        goal_ratio: GPU time over the contender ``frozen``'s to stay under, where there is a goal.
        limit: the largest relative error between contenders.
        fields: further fields of the rows.
    """

    operator: str
    shape: str
    bands: str
    pass_name: str
    least_bytes: int | None
    build: Callable[[Session], Iterable[Contender | Absent]] = field(repr=False)
    goal_us: float | None = None
    eager_goal_us: float | None = None
    least_flops: int | None = None
    goal_ratio: float | None = None
    limit: float = LIMIT
    fields: Mapping[str, Any] = field(default_factory=dict)


def chosen_passes(options: Options, passes: Sequence[str]) -> list[str]:
    """Those of the operator's passes that are asked for.

    Raises:
        ValueError: none of the passes asked for exists.
    """
    chosen = [p for p in passes if options.passes is None or p in options.passes]
    if not chosen:
        asked = ", ".join(options.passes or ())
        raise ValueError(f"passes must be of {', '.join(passes)} for {options.operator}, got {asked!r}")
    return chosen


def is_ours(name: str) -> bool:
    """Whether a contender is the operator itself, whatever the variant."""
    return name.partition(":")[0] == OURS


Build = Callable[["Session", str, Shape, tuple[str, int]], Iterable["Contender | Absent"]]


def latent_cases(
    options: Options, passes: Sequence[str], traffic: dict[str, int | None], build: Build
) -> Iterator[Case]:
    """Cases of an operator on latents, every pass × definition × shape; what is asked most comes first.

    Args:
        options: the run's.
        passes: the passes the operator has.
        traffic: how many latents a pass must at least read and write, None: not the latent's.
        build: ``build(session, pass, shape, definition)`` makes the contenders.

    Raises:
        ValueError: none of the passes asked for exists.
    """
    for pass_name in chosen_passes(options, passes):
        for definition in options.bands:
            for shape in options.shapes:
                latents = traffic[pass_name]
                goals = definition == ("dog", 3) and options.dtype == torch.float32
                key = (options.operator, pass_name)
                yield Case(
                    options.operator,
                    "x".join(map(str, shape)),
                    f"{definition[0]}({definition[1]})",
                    pass_name,
                    None if latents is None else latents * math.prod(shape) * options.dtype.itemsize,
                    _bound(build, pass_name, shape, definition),
                    GOALS.get(key, {}).get(shape) if goals else None,
                    EAGER_GOALS.get(key, {}).get(shape) if goals else None,
                )


def _bound(build: Build, pass_name: str, shape: Shape, definition: tuple[str, int]) -> Any:
    return lambda session: build(session, pass_name, shape, definition)


def draw_latent(shape: Shape, session: Session, seed: int = 0) -> Tensor:
    """A latent (N, ..., H, W) in the run's dtype: noise over a smooth slope, so that every band holds energy."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (noise + 2 * torch.linspace(-1, 1, shape[-1])).to(session.device, session.dtype)


def differentiable(
    name: str,
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Tensor],
    leaves: Sequence[int],
    pass_name: str,
    gradients: Sequence[Tensor] | None = None,
    **more: Any,
) -> Contender:
    """A contender out of a function that autograd goes through.

    Args:
        name: the contender's.
        function: of ``arguments``, to one tensor or several.
        arguments: tensors without gradient; they are not changed.
        leaves: which of them the backward pass reaches.
        pass_name: ``forward`` builds no graph; ``backward`` differentiates one forward again and again;
            ``step`` does both.
        gradients: one an output; None: :func:`upstream`'s.
        more: further fields of the contender.
    """

    def outputs(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = function(*given)
        return (found,) if isinstance(found, Tensor) else found

    def upstreams(outs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        return [upstream(out) for out in outs] if gradients is None else gradients

    if pass_name == "forward":
        return Contender(name, lambda: outputs(arguments), **more)
    inputs = [a.detach().requires_grad_(i in leaves) for i, a in enumerate(arguments)]
    wanted = [inputs[i] for i in leaves]
    if pass_name == "step":

        def step() -> tuple[Tensor, ...]:
            outs = outputs(inputs)
            return (*(out.detach() for out in outs), *torch.autograd.grad(outs, wanted, upstreams(outs)))

        return Contender(name, step, **more)
    kept: list[tuple[tuple[Tensor, ...], Sequence[Tensor]]] = []

    def backward() -> tuple[Tensor, ...]:
        if not kept:  # in the first call, so that the forward's stream is the timed one
            outs = outputs(inputs)
            kept.append((outs, upstreams(outs)))
        return torch.autograd.grad(kept[0][0], wanted, kept[0][1], retain_graph=True)

    return Contender(name, backward, **more)


_upstreams: dict[tuple[Any, ...], Tensor] = {}


def upstream(out: Tensor) -> Tensor:
    """A fixed gradient of ``out``: cosines, or 1 for a scalar; made once a shape."""
    key = (tuple(out.shape), out.dtype, out.device)
    if key not in _upstreams:
        values = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        _upstreams[key] = values.to(out.device, out.dtype)
    return _upstreams[key]
