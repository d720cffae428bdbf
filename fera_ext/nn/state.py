"""The gate that all adapted layers of a model share, and how a backward pass finds the right one.

The gate of a forward lives in :class:`GateState` only while that forward runs. Gradient checkpointing runs
parts of it again during the backward pass, when the state may long belong to another forward. Two
mechanisms bring the right gate back:

* blocks checkpointed through a diffusers model take their gate as an explicit argument
  (:mod:`fera_ext.adapter.checkpointing`);
* for a model that calls ``torch.utils.checkpoint`` itself, a hook on each output of the denoiser fires
  when its backward pass begins and puts its gate back (:class:`Replay`). The engine runs the nodes of later
  forwards first and each forward's output before its inside, so several pending forwards keep apart.

A layer that finds no gate raises; it never uses the gate of another forward. Each operator call gets a view of the
gate of its own (:meth:`GateState.view`), so that the gradients come back in one reduction (:mod:`fera_ext.nn.fan`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fera_ext.nn.fan import Fan

if TYPE_CHECKING:
    from fera_ext.nn.sharing import SharedInput

GUESS: Mapping[int, int] = {1: 16}
"""Operator calls of what cannot be looked through."""


def draw_seed(device: torch.device) -> Tensor:
    """A seed for dropout, (1,) int64, from the device's generator: no synchronisation, and a CUDA graph captures it."""
    return torch.randint(2**62, (1,), device=device)


class GateState:
    """The gate of the running forward; plain attributes, read by every adapted layer.

    Args:
        calls: how many operator calls a forward makes with it, roughly, by the number of layers each is for.
        drops: whether a layer has dropout, or has had: without, no forward looks through the layers for it.

    Attributes:
        gate: (G, E), the gate of the running forward, None outside of one.
        seed: (1,) int64, of the running forward's dropout; None where no layer drops. It goes wherever the gate goes:
            a recomputation drops what its forward dropped.
        enabled: whether the experts act; False gives the base layers' own outputs.
        last: (G, E), the gate of the last enabled forward, None before the first.
        disabled_depth: how many :meth:`fera_ext.adapter.FeraAdapter.disabled` blocks are open.
        plan: which layers run as one (:mod:`fera_ext.nn.sharing`), as a number; a recomputation has its forward's.
        holding: the groups that keep outputs for calls to come.
        calls: how many operator calls the gate is for in what runs, the model or a checkpointed block of it, by the
            number of layers each is for.
        fans: where the views of the gate come from, by device.
        adapted: a checkpointed block's operator calls, likewise.
    """

    def __init__(self, calls: Mapping[int, int] | None = None, drops: bool = False) -> None:
        self.gate: Tensor | None = None
        self.seed: Tensor | None = None
        self.enabled = True
        self.last: Tensor | None = None
        self.disabled_depth = 0
        self.adapted: weakref.WeakKeyDictionary[nn.Module, dict[int, int]] = weakref.WeakKeyDictionary()
        self.plan = 0
        self.holding: set[SharedInput] = set()
        self.calls: Mapping[int, int] = dict(calls or GUESS)
        self.drops = drops
        self.fans: dict[torch.device, Fan] = {}
        self._newest = 0
        self._replanned = False
        self._held: dict[int, tuple[Tensor | None, Tensor | None, bool, int, list[Replay]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> GateState:
        copied = GateState(self.calls, self.drops)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[type[GateState], tuple[Mapping[int, int], bool]]:
        return GateState, (self.calls, self.drops)

    def view(self, device: torch.device, members: int = 1) -> Tensor:
        """The bound gate's values on ``device``, for one operator call; not to be modified.

        (G, E); for a group of ``members`` layers it may also be (members, G, E).
        """
        gate = self.gate
        assert gate is not None
        if not gate.requires_grad or not torch.is_grad_enabled():
            return gate if gate.device == device else gate.to(device)
        fan = self.fans.get(device)
        if fan is None or fan.gate is not gate or fan.version != gate._version:
            fan = self.fans[device] = Fan(gate, device, self.calls)
        return fan.view(members)

    def view_of_block(self) -> Tensor:
        """(G, E), the bound gate's values for a checkpointed block."""
        assert self.gate is not None
        calls = self.calls
        if not self.fans:  # there are no more blocks than operator calls
            self.calls = {**calls, 1: sum(calls.values())}
        try:
            return self.view(self.gate.device)
        finally:
            self.calls = calls

    def reset(self) -> None:
        """Before a forward: forget what a backward pass that raised has left behind, and take the newest plan."""
        self._held.clear()
        self.fans.clear()
        self.drop_kept()
        self._newest += self._replanned
        self.plan, self._replanned = self._newest, False
        self.gate = self.seed = None
        self.enabled = self.disabled_depth == 0

    def next_plan(self) -> int:
        """The number of the plan from the next forward on, which differs from the newest."""
        self._replanned = True
        return self._newest + 1

    def drop_kept(self, wasted: bool = False) -> None:
        """Forget all outputs that are kept for calls to come; ``wasted``: those calls should have come."""
        while self.holding:
            self.holding.pop().drop(wasted)

    def hold(self, replay: Replay) -> None:
        """Bind ``replay``'s gate until the running backward pass ends."""
        task = torch._C._current_graph_task_id()
        if task not in self._held:
            self._held[task] = (self.gate, self.seed, self.enabled, self.plan, [])
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._release, task))
        replays = self._held[task][-1]
        if replay not in replays:
            replays.append(replay)
        self.gate, self.seed = replay.begin(), replay.seed
        self.enabled, self.plan = replay.enabled, replay.plan

    def _release(self, task: int) -> None:
        self.gate, self.seed, self.enabled, self.plan, replays = self._held.pop(task)
        self.fans.clear()
        self.drop_kept()
        for replay in replays:
            replay.finish()


class Replay:
    """Puts the gate of one forward back when the backward pass reaches that forward's output.

    The recomputed layers get a *relay*: a leaf with the gate's value. Non-reentrant checkpointing never
    differentiates it. Reentrant checkpointing runs a backward pass of its own for every block, which must
    not enter the router's graph more than once: it stops at the relay, and the relay's gradient goes into
    the router once, at the end, through a fresh evaluation of the gate.

    Args:
        state: the model's gate state.
        gate: (G, E), the forward's gate, None for a forward with the experts off.
        seed: the forward's seed of dropout, None where no layer dropped.
        latent: (N, ..., H, W), what the gate was computed from.
        evaluate: latent to gate.
    """

    def __init__(
        self,
        state: GateState,
        gate: Tensor | None,
        seed: Tensor | None,
        latent: Tensor | None,
        evaluate: Callable[[Tensor], Tensor],
    ) -> None:
        self.state = state
        self.enabled = gate is not None
        self.gate = gate
        self.seed = seed
        self.latent = latent
        self.plan = state.plan
        self.version = None if latent is None or latent.is_inference() else latent._version
        self.evaluate = evaluate
        self.relay: Tensor | None = None

    def __call__(self, grad: Tensor) -> None:
        """As a tensor hook: the backward pass has reached the forward's output."""
        self.state.hold(self)

    def begin(self) -> Tensor | None:
        """The relay, made at the first call of a backward pass."""
        if self.relay is None and self.gate is not None:
            self.relay = self.gate.detach().requires_grad_(self.gate.requires_grad)
        return self.relay

    def finish(self) -> None:
        """Send the relay's gradient, if it has one, into the router (and the latent, if it asks)."""
        relay, self.relay = self.relay, None
        if relay is None or relay.grad is None or self.latent is None:
            return
        if self.version is not None and self.latent._version != self.version:
            raise RuntimeError(
                "FeraAdapter: the latent must be unchanged until the backward pass under reentrant "
                "gradient checkpointing, got one modified in place"
            )
        if self.latent.grad_fn is not None:
            raise RuntimeError(
                "FeraAdapter: the latent must be a leaf, or ask for no gradient, where the model calls "
                "reentrant gradient checkpointing itself, got one with a graph of its own "
                "(use_reentrant=False has no such limit)"
            )
        with torch.enable_grad():
            again = self.evaluate(self.latent)
        again.backward(relay.grad)
