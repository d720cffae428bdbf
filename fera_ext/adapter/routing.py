"""The hooks on the denoiser: each forward computes its gate from its own input latent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fera_ext.adapter import checkpointing
from fera_ext.adapter.guards import LayoutGuard, check_replica
from fera_ext.architectures import Extract, LatentSize, check_latent
from fera_ext.bands import Bands
from fera_ext.nn import FeraLinear, GateState, SoftFrequencyRouter
from fera_ext.nn.sharing import saving_hooks
from fera_ext.nn.state import Replay, draw_seed


class Routing:
    """Before the forward: latent to gate. After it: the gate is unbound and its backward pass prepared.

    Args:
        model: the denoiser.
        router: the model's router.
        bands: the definition of the frequency bands.
        extract: finds the latent in a call's arguments.
        state: the gate state shared with the adapted layers.
        layers: the adapted layers by dotted path.
    """

    def __init__(
        self,
        model: nn.Module,
        router: SoftFrequencyRouter,
        bands: Bands,
        extract: Extract,
        state: GateState,
        layers: Mapping[str, FeraLinear],
    ) -> None:
        self.router = router
        self.bands = bands
        self.extract = extract
        self.state = state
        self.size = LatentSize()
        self.checkpointing = checkpointing.checkpointing_modules(model)
        self.guard = LayoutGuard(model, layers)
        self._layers = tuple(dict.fromkeys(layers.values()))
        self._outer: tuple[Tensor | None, Tensor | None] = None, None
        self._latent: Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            # Also when the forward raises an Exception, as a recomputation does once it has what it needs.
            model.register_forward_hook(self.after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model and its checkpointing functions."""
        for handle in self._handles:
            handle.remove()
        checkpointing.unbind(self.checkpointing)
        self.state.reset()

    def evaluate(self, latent: Tensor) -> Tensor:
        """Latent (N, ..., H, W) to the gate (N, E)."""
        return self.router.from_latent(latent, self.bands)

    def bind_checkpointing(self) -> None:
        """See :meth:`fera_ext.adapter.FeraAdapter.bind_checkpointing`."""
        checkpointing.bind(self.checkpointing, self.state)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook.

        Raises:
            ValueError: the latent is not where the architecture has it.
            RuntimeError: the model was changed so that its layers would take wrong gates, or none.
        """
        check_replica(model)
        state = self.state
        if not torch.compiler.is_compiling():
            # Inside a backward pass the whole denoiser is being recomputed: give back what was bound.
            if torch._C._current_graph_task_id() == -1:
                state.reset()
            if saving_hooks() is not None:
                # A checkpoint around the denoiser and more: its recomputation may begin before any hook of ours could
                # tell it which plan its forward had. Both take the first one.
                state.plan = 0
            self._outer = state.gate, state.seed
            self.bind_checkpointing()
        if not state.enabled:
            return
        latent = check_latent(self.extract(args, kwargs, self.size), model)
        self.guard.check(latent.shape[0])
        state.gate = state.last = self.evaluate(latent)
        # Here and not in the first layer that drops: that may be inside a checkpointed block, whose recomputation has
        # the generator's state of the block's beginning and must not draw.
        drops = state.drops and any(layer.drops for layer in self._layers)
        state.seed = draw_seed(latent.device) if drops else None
        self._latent = latent

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        state, latent = self.state, self._latent
        if not torch.compiler.is_compiling():
            # A forward that raised has no output; what it did not come to was not wasted.
            state.drop_kept(wasted=output is not None)
        gate, seed = (state.gate, state.seed) if state.enabled else (None, None)
        state.gate = state.seed = self._latent = None
        if torch.compiler.is_compiling():
            return
        state.fans.clear()
        (state.gate, state.seed), self._outer = self._outer, (None, None)
        if torch.is_grad_enabled():
            replay = Replay(state, gate, seed, latent if state.enabled else None, self.evaluate)
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(replay)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a forward's output: a tensor, or containers and dataclasses of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for item in fields(output):
            yield from _tensors(getattr(output, item.name))
