"""One gate for hundreds of operator calls, and one reduction for the gradients that come back.

Autograd sums what comes back to a tensor by an addition a use: hundreds of launches for a few numbers. Here each use
gets a view of its own, all made at once, and the backward pass stacks the gradients and sums them once. A group of
linears that run as one operator gets the gate once a member, (members, G, E), and hands the members' gradients back
unadded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

from fera_ext._extension import C

_MORE = 32
"""Views of a kind made at a time once as many as expected are used."""


class Fan:
    """Views of one gate on one device; made when the first is asked for, and more when all are used.

    Args:
        gate: (G, E), asks for a gradient.
        device: where the views shall be.
        calls: how many uses are expected, by the number of members each is for.

    Attributes:
        gate: the gate given.
        version: its version; a gate modified in place needs a fan of its own.
    """

    __slots__ = ("_calls", "_near", "_views", "gate", "version")

    def __init__(self, gate: Tensor, device: torch.device, calls: Mapping[int, int]) -> None:
        self.gate = gate
        self.version = gate._version
        self._near = gate if gate.device == device else gate.to(device)
        self._calls = calls
        self._views: dict[int, list[Tensor]] = {}

    def view(self, members: int = 1) -> Tensor:
        """The gate's values on the device, for one use: (G, E) for one member, (members, G, E) for more."""
        views = self._views.get(members)
        if not views:
            if maybe_current_level() is not None or torch._C._get_tracing_state() is not None:
                return self._near  # functorch takes no function of this form, torch.jit.trace saves none
            self._make(members)
            views = self._views[members]
        return views.pop()

    def _make(self, members: int) -> None:
        """The views expected, of all kinds at once for one reduction; later a few of one kind."""
        calls = {members: _MORE, **self._calls}
        if self._views:
            calls = {members: min(calls[members], _MORE)}
        made = C.fan_out(self._near, list(calls.items()))
        for kind, count in calls.items():
            self._views[kind], made = made[:count], made[count:]
