"""Which adapted projections of a model are given the same tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from fera_ext.nn import FeraLinear, GateState
from fera_ext.nn.sharing import SharedInput

SELF = ("to_q", "to_k", "to_v")
CROSS = ("to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
"""diffusers' names of an attention's projections, in the order in which its processors call them."""


def share_inputs(model: nn.Module, layers: Mapping[str, FeraLinear], state: GateState) -> list[SharedInput]:
    """Links the adapted projections of every attention that are given the same tensor.

    Of an attention that says ``is_cross_attention`` these are keys and values; of every other one also the query. A
    guess that is wrong costs one forward a little time and the memory of the outputs that nobody asks for
    (:mod:`fera_ext.nn.sharing`); under a checkpoint around the whole denoiser, every forward.

    Args:
        model: the denoiser, its layers wrapped.
        layers: the adapted linears by dotted path.
        state: the model's gate state.

    Returns:
        The groups, in the model's order.
    """
    parents: dict[int, nn.Module] = {}
    of_layer: dict[int, set[int]] = {}
    for path, layer in layers.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        parents[id(parent)] = parent
        of_layer.setdefault(id(layer), set()).add(id(parent))
    groups = []
    for key, parent in parents.items():
        for names in _candidates(parent):
            named = {name: getattr(parent, name, None) for name in names}
            # A layer of two attentions would have to know which of them calls it.
            own = {n: m for n, m in named.items() if isinstance(m, FeraLinear) and of_layer.get(id(m)) == {key}}
            members = {n: m for n, m in own.items() if _alike(m, next(iter(own.values())))}
            if len(members) > 1 and len(set(members.values())) == len(members):
                group = SharedInput(parent, members, state)
                for member in members.values():
                    member.shared = group
                groups.append(group)
    return groups


def _candidates(attention: nn.Module) -> Iterator[tuple[str, ...]]:
    yield CROSS if getattr(attention, "is_cross_attention", False) else SELF
    yield ADDED


def _alike(layer: FeraLinear, first: FeraLinear) -> bool:
    """Whether the operator could take both."""
    return (
        type(layer).forward is FeraLinear.forward
        and layer.in_features == first.in_features
        and layer.lora_A.shape[0] == first.lora_A.shape[0]
        and layer.scale == first.scale
    )
