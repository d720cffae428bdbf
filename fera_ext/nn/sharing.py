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
from typing import TYPE_CHECKING, Any

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


Weights = tuple[Tensor, "Tensor | None", Tensor, Tensor]
"""Weight, bias, lora_A and lora_B, read from the modules at each call: they may be others at the next one."""


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
        self._kept: Any = None  # C.Kept: the outputs, and what the calls to come must be given
        self._computed: tuple[FeraLinear, ...] = ()  # the layers of what is kept, the one that was called first

    @property
    def members(self) -> tuple[FeraLinear, ...]:
        """The layers that share from the next forward on; none where the guess was wrong."""
        return self._plans[0][1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts with a gate state of its own.
        return {**self.__dict__, "_plans": ((0, self.members),), "_kept": None, "_computed": ()}

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
                if not kept.waiting:
                    self.drop()
                return out
        if layer is not members[0] or x.is_inference():
            return None
        return self._ahead(members, x, gate)

    def _ahead(self, members: tuple[FeraLinear, ...], x: Tensor, gate: Tensor) -> Tensor | None:
        """The first member's output, (N, ..., out), the others' kept; None where the operator cannot take them all."""
        scale = members[0].scale
        found: tuple[list[Any], list[Any], list[Any], list[Any]] | None = C.joined(
            self._attention._modules, self._names, members, scale, x
        )
        if found is None:
            return None
        view = self.state.view(x.device, len(members))
        outputs = ops.expert_linear_group(x, *found, view, scale)
        self._kept, self._computed = C.Kept(members, x, gate, scale, outputs, *found), members
        self.state.holding.add(self)
        return outputs[0]

    def drop(self, wasted: bool = False) -> None:
        """Forget the outputs that are kept; ``wasted``: they will not be asked for, so go on without their layers."""
        kept, self._kept = self._kept, None
        computed, self._computed = self._computed, ()
        self.state.holding.discard(self)
        if kept is None or not wasted or computed is not self.members:
            return
        used = tuple(m for m in computed if not kept.waits(m))
        rest = used if len(used) > 1 else computed[1:]
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


def weights_of(layer: FeraLinear) -> Weights | None:
    """What ``layer`` computes with where its base layer is plain (:func:`is_plain`) and all of it are parameters.

    What is not there (parametrised weights, computed at each access) gives None, and the layer takes the form for any
    base layer.
    """
    return C.weights_of(layer)  # type: ignore[no-any-return]


def plain_weights(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias where ``base`` is plain (:func:`is_plain`) and both are parameters."""
    return C.plain_weights(base)  # type: ignore[no-any-return]


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
