"""Plain PyTorch rivals: torch.fft or matrix products with everything constant on the device, eager and compiled.

A band definition has one or two formulations (:func:`formulations`); the one that is faster in a case is the
one that is timed, eager and compiled, so that the rival is PyTorch's best.
"""

from __future__ import annotations

import math
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fera_ext.bands import Bands, Filters
from fera_ext.bench.cases import Absent, Contender, differentiable

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session


@dataclass(frozen=True)
class Formulation:
    """One way to get energies (N, K) float32 from a latent (N, ..., H, W): ``energies(z, *constants)``."""

    name: str
    energies: Callable[..., Tensor]
    constants: tuple[Tensor, ...]


def folded_masks(filters: Filters, width: int) -> Tensor:
    """(K, H, W//2+1): squared transfers times what each entry of the half spectrum counts, over H·W."""
    height, columns = filters.table.shape[1:]
    twice = torch.full((columns,), 2.0, dtype=filters.table.dtype, device=filters.table.device)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return filters.table * twice / (height * width)


def _power(z: Tensor) -> Tensor:
    """(N, H·(W//2+1)): |spectrum|², summed over the planes."""
    spectrum = torch.fft.rfft2(z.float())
    power = spectrum.real.square() + spectrum.imag.square()
    return power.flatten(1, -3).sum(1).flatten(1)


def spectral_matmul(z: Tensor, masks: Tensor) -> Tensor:
    """masks: (H·(W//2+1), K)"""
    return _power(z) @ masks


def spectral_sum(z: Tensor, masks: Tensor) -> Tensor:
    """masks: (K, H·(W//2+1))"""
    return (_power(z).unsqueeze(1) * masks).sum(2)


def separable_matmul(z: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """One product over the rows for all blurs, one batch over the columns. left: (J·H, H), right: (J, W, W)."""
    samples, height, width = z.shape[0], z.shape[-2], z.shape[-1]
    planes = z.float().reshape(samples, -1, height, width)
    lines = planes.permute(2, 0, 1, 3).reshape(height, -1)
    blurs = (left @ lines).view(right.shape[0], -1, width) @ right
    return _differences(blurs.view(right.shape[0], height, samples, -1), (1, 3))


def separable_conv2d(z: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Two depthwise passes for all blurs at once. columns: (J, 1, T, 1), rows: (J, 1, 1, T)."""
    samples, height, width = z.shape[0], z.shape[-2], z.shape[-1]
    half = columns.shape[2] // 2
    planes = z.float().reshape(-1, 1, height, width)
    blurs = F.conv2d(planes, columns, padding=(half, 0))
    blurs = F.conv2d(blurs, rows, padding=(0, half), groups=rows.shape[0])
    blurs = blurs.view(samples, -1, rows.shape[0], height * width)
    return _differences(blurs.permute(2, 0, 1, 3), (2, 3))


def _differences(blurs: Tensor, summed: tuple[int, int]) -> Tensor:
    """(J, ...) blurs, narrow to wide, to (N, J): the widest, then their differences, low to high."""
    low = blurs[-1:].square().sum(summed)
    rest = (blurs[:-1] - blurs[1:]).square().sum(summed)
    return torch.cat((low, rest.flip(0))).T


def gaussian_taps(sigma: float, size: int | None = None) -> Tensor:
    """Normalised Gaussian of int(8σ + 1) taps made odd, float64; zeros around it up to ``size``."""
    half = (int(8 * sigma + 1) | 1) // 2
    weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / sigma) ** 2)
    extra = 0 if size is None else (size - len(weights)) // 2
    return F.pad(weights / weights.sum(), (extra, extra))


def sigmas(count: int, height: int, width: int) -> list[float]:
    """The author bands' standard deviations in pixels, κ·2^j with κ = min(H, W)/128."""
    return [min(height, width) / 128.0 * 2.0**j for j in range(count)]


def formulations(bands: Bands, height: int, width: int, device: torch.device) -> list[Formulation]:
    """Every formulation of a definition at one latent size, constants on the device in float32."""

    def put(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(device, torch.float32).contiguous() for t in tensors)

    filters = bands.filters(height, width, torch.device("cpu"), torch.float64)
    if filters.right is None:
        masks = folded_masks(filters, width).flatten(1)
        return [
            Formulation("rfft2, matmul", spectral_matmul, put(masks.T)),
            Formulation("rfft2, sums", spectral_sum, put(masks)),
        ]
    deviations = sigmas(bands.count, height, width)
    longest = max(len(gaussian_taps(s)) for s in deviations)
    taps = torch.stack([gaussian_taps(s, longest) for s in deviations])[:, None]
    return [
        Formulation("matmul", separable_matmul, put(filters.table.flatten(0, 1), filters.right.transpose(1, 2))),
        Formulation("conv2d", separable_conv2d, put(taps[..., None], taps[:, :, None])),
    ]


class Compiler:
    """torch.compile, fullgraph and for fixed shapes, until it has used its seconds.

    Args:
        seconds: once compilations have taken so long, :meth:`__call__` gives None.
        budget: of the whole run, in seconds, for the sentence that says why.

    Attributes:
        spent: seconds of all compilations.
        room: seconds that the run can spare; None is given once a compilation takes longer in the mean.
        refusal: why the last None was given.
    """

    def __init__(self, seconds: float, budget: float | None = None) -> None:
        self.seconds = seconds
        self.budget = budget
        self.spent = 0.0
        self.room = math.inf
        self.refusal = ""
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._passes: set[Any] = set()

    def __call__(self, key: Any, pass_name: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The compiled function, one a ``key``, or None when the time is up and it would compile anew."""
        if (key, pass_name) not in self._passes:
            if self.spent >= self.seconds:
                self.refusal = f"torch.compile had used up its {self.seconds:g} s (--compile-seconds)"
                return None
            if self.room <= self.spent / max(1, len(self._passes)):
                self.refusal = f"torch.compile would not have ended within {self.budget:g} s (--budget)"
                return None
            self._passes.add((key, pass_name))
        if key not in self._functions:
            # A retained graph is differentiated again and again: its buffers must not be given away.
            import torch._functorch.config as functorch

            functorch.donated_buffer = False
            # A code object of its own: no guard of another shape is tried before this one's.
            own = types.FunctionType(
                function.__code__.replace(),
                function.__globals__,
                function.__name__,
                function.__defaults__,
                function.__closure__,
            )
            own.__kwdefaults__ = function.__kwdefaults__
            self._functions[key] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._functions[key]

    def timed(self, run: Callable[[], Any]) -> Any:
        """Runs something that compiles, and counts its seconds."""
        start = time.perf_counter()
        try:
            return run()
        finally:
            self.spent += time.perf_counter() - start


def plain(
    session: Session,
    operator: str,
    pass_name: str,
    bands: Bands,
    arguments: Sequence[Tensor],
    leaves: Sequence[int],
    head: Callable[..., Tensor],
) -> Iterator[Contender | Absent]:
    """The rivals ``torch`` and ``compiled``.

    Args:
        session: the run.
        operator, pass_name: what is timed.
        bands: the band definition.
        arguments: the operator's tensors, a latent among them.
        leaves: which of them the backward pass reaches.
        head: ``head(energies, *arguments)``, the operator in plain PyTorch.
    """
    if "torch" not in session.options.peers and "compiled" not in session.options.peers:
        return
    height, width = arguments[0].shape[-2:]
    count = len(arguments)
    functions, contenders = {}, {}
    for form in formulations(bands, height, width, session.device):

        def function(*tensors: Tensor, energies: Callable[..., Tensor] = form.energies) -> Tensor:
            return head(lambda z: energies(z, *tensors[count:]), *tensors[:count])

        tensors = [*arguments, *form.constants]
        functions[form.name] = (function, tensors)
        contenders[form.name] = differentiable("torch", function, tensors, leaves, pass_name, form=form.name)
    kind = "separable" if bands.name == "author" else "spectral"
    key = (operator, kind, bands.count, tuple(arguments[0].shape))
    name = session.fastest((*key, pass_name), contenders)
    if "torch" in session.options.peers:
        yield contenders[name]
    if "compiled" not in session.options.peers:
        return
    function, tensors = functions[name]
    compiled = session.compiler((*key, name), pass_name, function)
    if compiled is None:
        yield Absent("compiled", session.compiler.refusal)
    else:
        yield differentiable("compiled", compiled, tensors, leaves, pass_name, form=name, compiles=True)
