"""Many small parameters as one: what clips and updates gradients then launches a few kernels, not thousands.

An adapter has hundreds to thousands of small tensors. An optimizer with several tensors a step for each of them
spends its time in Python and in launches. :class:`FlatParameters` gives it one tensor for each device and dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 128
"""Bytes. Each parameter starts at a multiple: vector loads and TMA ask for 16 of them, a cache line has 128."""


class _Group:
    """The parameters of one device and dtype.

    Attributes:
        indices: their places among all parameters.
        flat: (total,), the values; the gaps between parameters hold zeros.
        buffer: (total,), where their gradients are gathered; zeros in the gaps.
        pieces: the parts of ``flat`` that the parameters are, each of its parameter's shape.
        targets: the parts of ``buffer``, likewise.
    """

    def __init__(self, parameters: list[nn.Parameter], indices: list[int]) -> None:
        self.indices = indices
        self.parameters = [parameters[i] for i in indices]
        first = self.parameters[0]
        unit = max(1, ALIGNMENT // first.element_size())
        self.offsets: list[int] = []
        total = 0
        for parameter in self.parameters:
            self.offsets.append(total)
            total += -(-parameter.numel() // unit) * unit
        values = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.buffer = torch.zeros_like(values)
        self.pieces, self.targets = self.split(values), self.split(self.buffer)
        with torch.no_grad():
            for piece, parameter in zip(self.pieces, self.parameters):
                piece.copy_(parameter)
                parameter.data = piece
        self.places = [piece.data_ptr() for piece in self.pieces]
        self.flat = nn.Parameter(values)

    def split(self, whole: Tensor) -> list[Tensor]:
        """The parameters' parts of (total,), as views of their shapes."""
        return [whole[start : start + p.numel()].view(p.shape) for start, p in zip(self.offsets, self.parameters)]

    def collect(self, accumulate: bool) -> None:
        accumulate = accumulate and self.flat.grad is not None  # zero_grad leaves the buffer as it was
        moved: list[Tensor] = []
        targets: list[Tensor] = []
        absent: list[Tensor] = []
        for parameter, place, target in zip(self.parameters, self.places, self.targets):
            if parameter.data_ptr() != place:
                raise RuntimeError(
                    "FlatParameters: parameters must stay views of the flat tensor, got one of shape "
                    f"{tuple(parameter.shape)} that was given other memory (move and cast the model first)"
                )
            grad = parameter.grad
            if grad is None:
                absent.append(target)
            elif grad.data_ptr() != target.data_ptr():
                moved.append(grad)
                targets.append(target)
                parameter.grad = None
        if not accumulate and absent:
            torch._foreach_zero_(absent)
        if moved and accumulate:
            torch._foreach_add_(targets, moved)
        elif moved:
            torch._foreach_copy_(targets, moved)
        self.flat.grad = self.buffer


class FlatParameters:
    """One flat tensor for each device and dtype, of which every parameter becomes a view.

    Only where the values lie changes: the parameters are the same objects, and state dicts, saving, loading in
    place, hooks and DistributedDataParallel find them as before. Moving or casting the model afterwards would part
    them from the flat tensors; :meth:`collect` says so. The backward pass is left alone too: autograd hands each
    parameter its gradient without a copy, and :meth:`collect` gathers them all in a few launches. ::

        flat = FlatParameters(adapter.parameters())
        optimizer = torch.optim.AdamW(flat.parameters(), lr=1e-4, fused=True)
        loss.backward()
        flat.collect()
        torch.nn.utils.clip_grad_norm_(flat.parameters(), 1.0)
        optimizer.step()

    An optimizer must be elementwise (AdamW, SGD, Lion), because it no longer sees where a parameter ends. The flat
    tensors have gaps, in which values and gradients are zero and stay so under weight decay. A parameter that got no
    gradient counts as one with a gradient of zero: where AdamW would have passed it over, it decays and goes on by its
    old moments. ``load_state_dict(assign=True)`` replaces the parameters by others: make the flat ones after it.

    Args:
        parameters: the parameters to train, contiguous, each once.

    Raises:
        ValueError: no parameter, one twice, one that is no leaf in floating point, or one that asks for no gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._own = list(parameters)
        if not self._own:
            raise ValueError("FlatParameters: parameters must be at least one, got none")
        if len({id(p) for p in self._own}) < len(self._own):
            raise ValueError("FlatParameters: parameters must be different tensors, got one twice")
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index, parameter in enumerate(self._own):
            if not parameter.is_floating_point() or not parameter.is_leaf or parameter.is_meta:
                raise ValueError(
                    "FlatParameters: parameters must be leaves in floating point on a real device, got one of dtype "
                    f"{parameter.dtype} on {parameter.device}"
                )
            if not parameter.requires_grad:
                raise ValueError(
                    "FlatParameters: parameters must ask for gradients, got one of shape "
                    f"{tuple(parameter.shape)} that does not (leave frozen ones out)"
                )
            kinds.setdefault((parameter.device, parameter.dtype), []).append(index)
        self._groups = [_Group(self._own, indices) for indices in kinds.values()]

    def parameters(self) -> list[nn.Parameter]:
        """The flat tensors, for the optimizer and the clipping; one for each device and dtype."""
        return [group.flat for group in self._groups]

    def collect(self, accumulate: bool = False) -> None:
        """Move every parameter's gradient into the flat tensors' ``grad``.

        Afterwards the parameters' own ``grad`` is None, so that the next backward pass hands its tensors over again
        instead of adding to them one by one. A ``grad`` that is a part of the flat gradient already stays as it is.

        Args:
            accumulate: add to what the flat gradient holds instead of replacing it. A parameter without a gradient
                adds nothing, or counts as zero.

        Raises:
            RuntimeError: a parameter was moved or cast since, so that the optimizer would update another tensor.
        """
        with torch.no_grad():
            for group in self._groups:
                group.collect(accumulate)
        # What comes next changes the values through the flat tensors: a graph that still wants the old ones must raise.
        torch.autograd.graph.increment_version(self._own)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or fill them with zeros."""
        for group in self._groups:
            for parameter in group.parameters:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()
            if set_to_none:
                group.flat.grad = None
            else:
                group.buffer.zero_()

    def split_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict for the flat tensors as the one that the parameters themselves would have.

        So checkpoints do not depend on how the flat tensors are laid out, or on whether there are any.
        """
        per_parameter: dict[int, dict[str, Any]] = {}
        for number, group in enumerate(self._groups):
            held = state["state"].get(number, {})
            parts = {k: group.split(v) for k, v in held.items() if _elementwise(v, group.buffer)}
            for place, index in enumerate(group.indices):
                if held:
                    per_parameter[index] = {k: parts[k][place] if k in parts else v for k, v in held.items()}
        (options,) = state["param_groups"]
        ordered = {index: per_parameter[index] for index in sorted(per_parameter)}
        return {"state": ordered, "param_groups": [{**options, "params": list(range(len(self._own)))}]}

    def join_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`split_state`.

        Parameters without a state (they never had a gradient) get one of zeros.

        Raises:
            ValueError: the state of other parameters.
        """
        (options,) = state["param_groups"]
        if len(options["params"]) != len(self._own):
            raise ValueError(
                f"the optimizer's state must be of {len(self._own)} parameters, got {len(options['params'])}"
            )
        joined: dict[int, dict[str, Any]] = {}
        for number, group in enumerate(self._groups):
            held = [state["state"].get(index, {}) for index in group.indices]
            known = next((h for h in held if h), None)
            if known is None:
                continue
            whole = joined[number] = dict(known)
            for name, value in known.items():
                if name == "step" or not isinstance(value, Tensor):
                    continue
                whole[name] = torch.zeros(group.buffer.shape, dtype=value.dtype, device=value.device)
                for piece, own in zip(group.split(whole[name]), held):
                    if not own:
                        continue
                    part = own[name]
                    if part.shape != piece.shape:
                        raise ValueError(
                            f"the optimizer's {name} must be of shape {tuple(piece.shape)}, got {tuple(part.shape)}"
                        )
                    piece.copy_(part)
        return {"state": joined, "param_groups": [{**options, "params": list(range(len(self._groups)))}]}


def _elementwise(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape
