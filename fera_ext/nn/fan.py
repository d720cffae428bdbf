"""One gate for hundreds of operator calls, and one reduction for the gradients that come back.

Autograd sums what comes back to a tensor by an addition a use: hundreds of launches for a few numbers. Here each use
gets a view of its own, all made at once, and the backward pass stacks the gradients and sums them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

_MORE = 32
"""Views made at a time once as many as expected are used."""


class _FanOut(torch.autograd.Function):
    """(G, E) to ``count`` views of it. A view that nobody used costs nothing in backward: no zeros stand for it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, count: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.set_materialize_grads(False)
        return gate.expand(count, *gate.shape).unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        given = [grad for grad in grads if grad is not None]
        if len(given) < 2:
            return (given[0] if given else None), None
        return torch.stack(given).sum(0), None


class Fan:
    """Views of one gate on one device; made when the first is asked for, and more when all are used.

    Args:
        gate: (G, E), asks for a gradient.
        device: where the views shall be.
        count: how many uses are expected.

    Attributes:
        gate: the gate given.
        version: its version; a gate modified in place needs a fan of its own.
    """

    __slots__ = ("_count", "_near", "_views", "gate", "version")

    def __init__(self, gate: Tensor, device: torch.device, count: int) -> None:
        self.gate = gate
        self.version = gate._version
        self._near = gate if gate.device == device else gate.to(device)
        self._count = count
        self._views: list[Tensor] = []

    def view(self) -> Tensor:
        """(G, E), the gate's values on the device, for one use."""
        if not self._views:
            if maybe_current_level() is not None or torch._C._get_tracing_state() is not None:
                return self._near  # functorch takes no function of this form, torch.jit.trace saves none
            self._views = list(_FanOut.apply(self._near, self._count))
            self._count = min(self._count, _MORE)
        return self._views.pop()
