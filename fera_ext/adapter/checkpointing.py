"""Gradient checkpointing of diffusers models: every checkpointed block takes its gate as an argument.

diffusers' modules call ``self._gradient_checkpointing_func(block, *args)``. The function is replaced by
:class:`BoundCheckpoint`, which passes the gate along as a tensor argument and binds it around the block. The
recomputation then sees the gate of its own forward, whatever ran since, and reentrant checkpointing returns
the gate's gradient to the router's graph like any input's. Inside the block the gate fans out again
(:mod:`fera_ext.nn.fan`), so that one gradient a block comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fera_ext.nn import FeraLinear, GateState
from fera_ext.nn.sharing import calls_of
from fera_ext.nn.state import GUESS


class Segment:
    """A checkpointed block with the gate as its first argument.

    Args:
        function: the block.
        state: the model's gate state.
        calls: the operator calls the block makes, roughly (:func:`fera_ext.nn.sharing.calls_of`).

    The recomputation runs the same layers as one as the forward did (:attr:`fera_ext.nn.GateState.plan`): it must
    save the same tensors. It also drops the same parts of the experts' input (:attr:`fera_ext.nn.GateState.seed`).
    """

    def __init__(self, function: Callable[..., Any], state: GateState, calls: Mapping[int, int]) -> None:
        self.function = function
        self.state = state
        self.calls = calls
        self.enabled = state.enabled  # whether the experts act in this forward
        self.plan = state.plan
        self.seed = state.seed

    def __call__(self, gate: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        before = state.gate, state.seed, state.enabled, state.plan, state.calls, state.fans
        state.drop_kept()  # a recomputation begins with nothing kept, and so must its forward
        state.gate, state.seed, state.enabled, state.plan = gate, self.seed, self.enabled, self.plan
        state.calls, state.fans = self.calls, {}
        try:
            result = self.function(*args, **kwargs)
            state.drop_kept(wasted=True)
            return result
        finally:
            state.gate, state.seed, state.enabled, state.plan, state.calls, state.fans = before
            state.drop_kept()


class BoundCheckpoint:
    """A ``_gradient_checkpointing_func`` that binds the gate; ``inner`` is the one it stands for."""

    def __init__(self, inner: Callable[..., Any], state: GateState) -> None:
        self.inner = inner
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The compiler traces the block with the gate as a captured input, which is the same thing.
        calls = None if torch.compiler.is_compiling() else self._adapted(function)
        if not calls:
            return self.inner(function, *args, **kwargs)
        state = self.state
        gate = state.gate if state.enabled else None
        if gate is not None:
            gate = state.view_of_block()
        if gate is not None and not gate.requires_grad and torch.is_grad_enabled():
            # Reentrant checkpointing gives no gradients at all to a block none of whose inputs asks.
            gate = gate.detach().requires_grad_()
        return self.inner(Segment(function, state, calls), gate, *args, **kwargs)

    def _adapted(self, function: Callable[..., Any]) -> Mapping[int, int]:
        """The operator calls of ``function``, none without an adapted layer; of a callable that is no module, a guess.

        A frozen block must not get the gate: reentrant checkpointing would differentiate it, and raise
        because nothing in it has a gradient.
        """
        if not isinstance(function, nn.Module):
            return GUESS
        known = self.state.adapted.get(function)
        if known is None:
            known = calls_of([m for m in function.modules() if isinstance(m, FeraLinear)])
            self.state.adapted[function] = known
        return known


def checkpointing_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a diffusers model that may checkpoint their blocks."""
    return tuple(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def bind(modules: tuple[nn.Module, ...], state: GateState) -> None:
    """Wrap the checkpointing function of every module that has checkpointing on.

    Called before each forward, so that it may be switched on or replaced at any time.
    """
    for module in modules:
        if module.gradient_checkpointing:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, BoundCheckpoint):
                module._gradient_checkpointing_func = BoundCheckpoint(function, state)  # type: ignore


def unbind(modules: tuple[nn.Module, ...]) -> None:
    """Undo :func:`bind`."""
    for module in modules:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, BoundCheckpoint):
            module._gradient_checkpointing_func = function.inner  # type: ignore
