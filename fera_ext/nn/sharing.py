"""Projections that are given the same tensor run as one operator, whoever calls them.

An attention calls ``to_q(x)``, ``to_k(x)`` and ``to_v(x)`` one after the other. The first of them computes all three
(:func:`fera_ext.ops.expert_linear_group`) and leaves the others' outputs for the very next calls with the identical
tensor. A call that does not fit takes the separate form, which gives the same numbers: another tensor; the same one,
the gate or the layer's weights modified in place; another gate, another gradient, inference or autocast mode, another
checkpointed segment, another order; and so does all under a functorch transform (vmap).

Which projections share is a guess from their names. Where a call proves it wrong the group goes on with those that
were used, or else without the first one, from the denoiser's next forward on: within a forward, and in its
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


def saving_hooks() -> Any:
    """The innermost hooks on saved tensors, which tell one checkpointed segment from another; None without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _key(x: Tensor, gate: Tensor) -> tuple[Any, ...]:
    """What decides, besides the identity of its arguments, on the result of a call and on what it saves."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, saving_hooks()
    return (*modes, x.requires_grad, x._version, _version(gate))


def _weights(layer: FeraLinear) -> tuple[int, ...]:
    """Changes whenever the layer's weights do."""
    bias = layer.bias
    return (
        _version(layer.weight),
        _version(layer.lora_A),
        _version(layer.lora_B),
        -1 if bias is None else _version(bias),
    )


class Kept:
    """Outputs computed ahead of their calls, and what those calls must be given.

    Attributes:
        members: the layers that were computed, the one that was called first.
        outputs: (N, ..., out_i) of those that have not been called yet.
    """

    __slots__ = ("_gate", "_key", "_weights", "_x", "members", "outputs")

    def __init__(
        self, members: tuple[FeraLinear, ...], x: Tensor, gate: Tensor, outputs: dict[FeraLinear, Tensor]
    ) -> None:
        self.members = members
        self.outputs = outputs
        self._x, self._gate, self._key = x, gate, _key(x, gate)
        self._weights = {layer: _weights(layer) for layer in outputs}

    def take(self, layer: FeraLinear, x: Tensor, gate: Tensor) -> Tensor | None:
        """The output of ``layer`` for exactly these arguments, once; None where it is not there."""
        if x is not self._x or gate is not self._gate or layer not in self.outputs or x.is_inference():
            return None
        plain = _joins(layer, self.members[0].scale) and is_plain(layer.base)
        if not plain or self._key != _key(x, gate) or self._weights[layer] != _weights(layer):
            return None
        return self.outputs.pop(layer)


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
        if torch._C._functorch.maybe_current_level() is not None:
            return None  # the group has no batching rule
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
        cast = torch.is_autocast_enabled(x.device.type)
        weights, biases, lora_as, lora_bs = [], [], [], []
        for member in members:
            base: Any = member.base
            # A wrapper in the layer's place (FSDP's) may be what makes its parameters whole.
            own = self._attention._modules.get(self._names[member]) is member
            if not (own and _joins(member, scale) and is_plain(base)):
                return None
            if base.weight.device != x.device or (base.weight.dtype != x.dtype and not cast):
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
