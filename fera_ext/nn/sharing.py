"""Projections that are given the same tensor run as one operator, whoever calls them.

An attention calls ``to_q(x)``, ``to_k(x)`` and ``to_v(x)`` one after the other. The first of them computes all three
(:func:`fera_ext.ops.expert_linear_group`) and leaves the others' outputs for the very next calls with the identical
tensor. A call that does not fit takes the separate form, which gives the same numbers: another tensor, or the same one
modified in place, another gate, another gradient, inference or autocast mode, another order.

Which projections share is a guess from their names. Where a call proves it wrong the group goes on without the
projections that were given something else, from the denoiser's next forward on: within a forward, and in its
recomputations, the guess stays (:attr:`fera_ext.nn.GateState.plan`), because gradient checkpointing requires that a
recomputation saves the same tensors as its forward did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fera_ext import ops

if TYPE_CHECKING:
    from fera_ext.nn.linear import FeraLinear
    from fera_ext.nn.state import GateState


def _mode(x: Tensor) -> tuple[bool, bool, torch.dtype | None]:
    """What decides, besides its arguments, on the result of a call."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


class Kept:
    """Outputs computed ahead of their calls, and what those calls must be given.

    Attributes:
        members: the layers that were computed, the one that was called first.
        outputs: (N, ..., out_i) of those that have not been called yet.
    """

    __slots__ = ("_gate", "_mode", "_version", "_x", "members", "outputs")

    def __init__(
        self, members: tuple[FeraLinear, ...], x: Tensor, gate: Tensor, outputs: dict[FeraLinear, Tensor]
    ) -> None:
        self.members = members
        self.outputs = outputs
        self._x, self._version, self._gate, self._mode = x, x._version, gate, _mode(x)

    def take(self, layer: FeraLinear, x: Tensor, gate: Tensor) -> Tensor | None:
        """The output of ``layer`` for exactly these arguments, once; None where it is not there."""
        same = x is self._x and gate is self._gate and x._version == self._version and self._mode == _mode(x)
        return self.outputs.pop(layer, None) if same else None


class SharedInput:
    """The projections of one attention that are taken to be given the same tensor.

    Args:
        attention: the module that calls them.
        members: two to four layers of the same ``in_features``, number of experts and scale, by their names in
            ``attention``, in the order of their calls.
        state: the model's gate state.
    """

    def __init__(self, attention: nn.Module, members: Mapping[str, FeraLinear], state: GateState) -> None:
        self.state = state
        self._attention = attention
        self._names = {layer: name for name, layer in members.items()}
        # Newest first: the members from a plan's number on.
        self._plans: tuple[tuple[int, tuple[FeraLinear, ...]], ...] = ((0, tuple(members.values())),)
        self._kept: Kept | None = None

    @property
    def members(self) -> tuple[FeraLinear, ...]:
        """The layers that share from the next forward on; none where the guess was wrong."""
        return self._plans[0][1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts with a gate state of its own.
        return {**self.__dict__, "_plans": ((0, self.members),), "_kept": None}

    def output(self, layer: FeraLinear, x: Tensor, gate: Tensor) -> Tensor | None:
        """What ``layer(x)`` gives, (N, ..., out), or None: then it computes by itself."""
        plan = self.state.plan
        since, members = self._plans[0]
        if since > plan:  # a forward, or its recomputation, that began before the newest plan
            members = next(m for since, m in self._plans if since <= plan)
        if layer not in members:
            return None
        if self._kept is not None:
            out = self._kept.take(layer, x, gate)
            if out is None:
                self.drop(wasted=True)
            else:
                if not self._kept.outputs:
                    self.drop()
                return out
        if layer is not members[0] or x.is_inference():
            return None
        scale = layer.scale
        weights, biases, lora_as, lora_bs = [], [], [], []
        for member in members:
            base: Any = member.base
            # A wrapper in the layer's place (FSDP's) may be what makes its parameters whole.
            own = self._attention._modules.get(self._names[member]) is member
            if not (own and _joins(member, scale) and is_plain(base)):
                return None
            weights.append(base.weight)
            biases.append(base.bias)
            lora_as.append(member.lora_A)
            lora_bs.append(member.lora_B)
        near = gate if gate.device == x.device else gate.to(x.device)
        outputs = ops.expert_linear_group(x, weights, biases, lora_as, lora_bs, near, scale)
        self._kept = Kept(members, x, gate, dict(zip(members[1:], outputs[1:])))
        self.state.holding.add(self)
        return outputs[0]

    def drop(self, wasted: bool = False) -> None:
        """Forget the outputs that are kept; ``wasted``: they will not be asked for, so go on without their layers."""
        kept, self._kept = self._kept, None
        self.state.holding.discard(self)
        if kept is None or not wasted or kept.members is not self.members:
            return
        used = tuple(m for m in kept.members if m not in kept.outputs)
        rest = used if len(used) > 1 else kept.members[1:]
        self._plans = ((self.state.next_plan(), rest if len(rest) > 1 else ()), *self._plans)


def _joins(layer: FeraLinear, scale: float) -> bool:
    """Whether a call of ``layer`` now is the operator of its base layer, with nobody listening to what comes in."""
    return (
        layer.scale == scale
        and not (layer.training and layer.dropout > 0)
        and not layer._forward_pre_hooks
        and "forward" not in layer.__dict__
    )


def is_plain(base: nn.Module) -> bool:
    """Whether base(x) is exactly F.linear(x, weight, bias), with nobody listening to the call."""
    return (
        type(base).forward is nn.Linear.forward
        and type(base.weight) in (nn.Parameter, Tensor)
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and not base._backward_hooks
        and not base._backward_pre_hooks
        and "forward" not in base.__dict__
    )
