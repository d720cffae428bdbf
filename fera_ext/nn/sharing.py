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

from collections import Counter
from collections.abc import Iterable, Mapping
from operator import is_not
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.modules.module as _global
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level

from fera_ext import ops
from fera_ext._extension import C

if TYPE_CHECKING:
    from fera_ext.nn.linear import FeraLinear
    from fera_ext.nn.state import GateState


def saving_hooks() -> Any:
    """The innermost hooks on saved tensors, which tell one checkpointed segment from another; None without any."""
    return C.saved_tensor_hooks()


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


Weights = tuple[Tensor, "Tensor | None", Tensor, Tensor]
"""Weight, bias, lora_A and lora_B, read from the modules at each call: they may be others at the next one."""


def _versions(weights: Weights) -> tuple[int, ...]:
    """Changes whenever the values do, other than by ``data``."""
    weight, bias, lora_a, lora_b = weights
    try:
        return weight._version, lora_a._version, lora_b._version, -1 if bias is None else bias._version
    except RuntimeError:  # inference tensors have none
        return tuple(-1 if t is None else _version(t) for t in weights)


class Kept:
    """Outputs computed ahead of their calls, and what those calls must be given.

    Attributes:
        members: the layers that were computed, the one that was called first.
        outputs: of those that have not been called yet: (N, ..., out_i), what it was computed with, its versions.
    """

    __slots__ = (
        "_autocast",
        "_device",
        "_gate",
        "_gate_version",
        "_grad",
        "_hooks",
        "_inference",
        "_scale",
        "_x",
        "_x_asks",
        "_x_version",
        "members",
        "outputs",
    )

    def __init__(
        self, members: tuple[FeraLinear, ...], x: Tensor, gate: Tensor, outputs: list[Tensor], weights: list[Weights]
    ) -> None:
        self.members = members
        self.outputs = {m: (out, own, _versions(own)) for m, out, own in zip(members, outputs, weights)}
        del self.outputs[members[0]]
        self._scale = members[0].scale
        self._x, self._x_version, self._x_asks = x, x._version, x.requires_grad
        self._gate, self._gate_version = gate, _version(gate)
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._device = _device_type(x)
        self._autocast = _autocast_dtype(self._device)
        self._hooks = saving_hooks()

    def take(self, layer: FeraLinear, x: Tensor, gate: Tensor) -> Tensor | None:
        """The output of ``layer`` for exactly these arguments, once; None where it is not there."""
        found = self.outputs.get(layer)
        # What decides on the result of a call and on what it saves; x and the gate by identity.
        if (
            found is None
            or x is not self._x
            or gate is not self._gate
            or x._version != self._x_version
            or x.requires_grad is not self._x_asks
            or _version(gate) != self._gate_version
            or torch.is_grad_enabled() is not self._grad
            or torch.is_inference_mode_enabled() is not self._inference
            or _autocast_dtype(self._device) != self._autocast
            or saving_hooks() != self._hooks
        ):
            return None
        out, then, versions = found
        own = _joining(layer, self._scale)
        if own is None or any(map(is_not, own, then)) or _versions(own) != versions:
            return None
        del self.outputs[layer]
        return out


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
        if maybe_current_level() is not None:
            return None  # the group has no batching rule
        plan = self.state.plan
        since, members = self._plans[0]
        if since > plan:  # a forward, or its recomputation, that began before the newest plan
            members = next(m for since, m in self._plans if since <= plan)
        if layer not in members:
            return None
        kept = self._kept
        if kept is not None:
            out = kept.take(layer, x, gate)
            if out is None:
                self.drop(wasted=True)
            else:
                if not kept.outputs:
                    self.drop()
                return out
        if layer is not members[0] or x.is_inference():
            return None
        return self._ahead(members, x, gate)

    def _ahead(self, members: tuple[FeraLinear, ...], x: Tensor, gate: Tensor) -> Tensor | None:
        """The first member's output, (N, ..., out), the others' kept; None where the operator cannot take them all."""
        scale, device, dtype = members[0].scale, x.device, x.dtype
        children, names = self._attention._modules, self._names
        found = []
        for member in members:
            # A wrapper in the layer's place (FSDP's) may be what makes its parameters whole.
            own = _joining(member, scale) if children.get(names[member]) is member else None
            if own is None or own[0].device != device:
                return None
            if own[0].dtype != dtype and not torch.is_autocast_enabled(device.type):
                return None
            found.append(own)
        weights, biases, lora_as, lora_bs = map(list, zip(*found))
        view = self.state.view(device, len(members))
        outputs = ops.expert_linear_group(x, weights, biases, lora_as, lora_bs, view, scale)
        self._kept = Kept(members, x, gate, outputs, found)
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


def calls_of(layers: Iterable[FeraLinear]) -> dict[int, int]:
    """How many operator calls ``layers`` make, by the number of layers each is for, where every guess holds."""
    calls: Counter[int] = Counter()
    groups: set[SharedInput] = set()
    for layer in layers:
        group = layer.shared
        if group is None or layer not in group.members:
            calls[1] += 1
        elif group not in groups:
            groups.add(group)
            calls[len(group.members)] += 1
    return dict(calls)


def _joining(layer: FeraLinear, scale: float) -> Weights | None:
    """What ``layer`` computes with where its call is the operator of its base layer, with nobody listening to what
    comes in; else None."""
    if layer.scale != scale or layer._forward_pre_hooks or layer.drops or "forward" in layer.__dict__:
        return None
    return weights_of(layer)


def weights_of(layer: FeraLinear) -> Weights | None:
    """What ``layer`` computes with where its base layer is plain (:func:`is_plain`) and all of it are parameters.

    Asking a module for a parameter by attribute takes ten times as long as asking the dict it is in. What is not there
    (parametrised weights, computed at each access) gives None, and the layer takes the form for any base layer.
    """
    given = plain_weights(layer._modules["base"])
    own: Any = layer._parameters
    try:
        return None if given is None else (*given, own["lora_A"], own["lora_B"])
    except KeyError:
        return None


def plain_weights(base: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias where ``base`` is plain (:func:`is_plain`) and both are parameters."""
    if not _unheard(base):
        return None
    given = base._parameters
    try:
        weight, bias = given["weight"], given["bias"]
    except KeyError:
        return None
    return (weight, bias) if type(weight) in _PLAIN else None


def is_plain(base: nn.Module) -> bool:
    """Whether base(x) is exactly F.linear(x, weight, bias), with nobody listening to the call."""
    return _unheard(base) and type(base.weight) in _PLAIN


_PLAIN = (nn.Parameter, Tensor)
_FORWARD = nn.Linear.forward


def _unheard(base: nn.Module) -> bool:
    """Whether a call of ``base`` runs nn.Linear's own forward and nothing else."""
    own = base.__dict__
    return (
        type(base).forward is _FORWARD
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and "forward" not in own
    )


def heard_everywhere() -> bool:
    """Whether somebody listens to the calls of all modules."""
    return bool(
        _global._global_forward_hooks
        or _global._global_forward_pre_hooks
        or _global._global_backward_hooks
        or _global._global_backward_pre_hooks
    )


def _device_type(x: Tensor) -> str:
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
