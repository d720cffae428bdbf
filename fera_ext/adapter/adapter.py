"""The handle on an attached adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fera_ext import ops
from fera_ext.adapter.guards import allow_saving
from fera_ext.adapter.matching import suffix_of
from fera_ext.adapter.routing import Routing
from fera_ext.config import FeraConfig
from fera_ext.nn import FeraLinear, SoftFrequencyRouter

ROUTER_NAME = "fera_router"
"""The router's name in the model's tree."""


class FeraAdapter:
    """What :func:`fera_ext.attach` attached to a model: its parameters, its gate, its off switch.

    Attributes:
        model: the adapted denoiser.
        config: the configuration it was attached with.
        layers: the adapted linears by dotted path.
        router: the soft frequency router, one for the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FeraConfig,
        layers: Mapping[str, FeraLinear],
        router: SoftFrequencyRouter,
        routing: Routing,
        asked: list[nn.Parameter],
    ) -> None:
        self.model = model
        self.config = config
        self.layers = dict(layers)
        self.router = router
        self._routing = routing
        self._asked = asked
        self._attached = True

    @property
    def matched(self) -> list[str]:
        """The dotted paths of the adapted linears, in the model's order."""
        return list(self.layers)

    @property
    def gate(self) -> Tensor | None:
        """(B, E), the gate of the last forward with the experts on, attached to the router's graph."""
        return self._routing.state.last

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """(height, width) of the latent in latent pixels, for models of packed tokens (FLUX).

        None (the default) reads it from the position ids, at one host synchronisation for each new ids
        tensor. Set it to avoid that, or to compile such a model as one graph.
        """
        return self._routing.size.given

    @latent_size.setter
    def latent_size(self, size: tuple[int, int] | None) -> None:
        if size is not None and not (len(size) == 2 and all(int(s) == s and s > 0 for s in size)):
            raise ValueError(f"FeraAdapter: latent_size must be (height, width) or None, got {size!r}")
        self._routing.size.given = None if size is None else (int(size[0]), int(size[1]))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The router's and the experts' parameters, under the names of :meth:`state_dict`."""
        for name, parameter in self.router.named_parameters():
            yield f"router.{name}", parameter
        for path, layer in self.layers.items():
            for name in layer.expert_parameters:
                yield f"layers.{path}.{name}", getattr(layer, name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train, each once."""
        seen: set[int] = set()
        for _, parameter in self.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

    def state_dict(self) -> dict[str, Tensor]:
        """``router.w1`` and the like, ``layers.<path>.lora_A``, ``layers.<path>.lora_B``; no copies."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values in; strict.

        Raises:
            ValueError: keys missing or unknown, or a tensor of another shape or dtype. Nothing is changed.
        """
        own = self.state_dict()
        check_tensors("load_state_dict", state, {k: (v.shape, v.dtype) for k, v in own.items()})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model: every adapted layer gives its base layer's own output, no gate is computed.

        May be nested; what was before is restored, also after an error.
        """
        state = self._routing.state
        state.disabled_depth += 1
        state.enabled = False
        try:
            yield
        finally:
            state.disabled_depth -= 1
            state.enabled = state.disabled_depth == 0

    def fecl_loss(self, base: Tensor, fera: Tensor, target: Tensor) -> Tensor:
        """``config.fecl_weight`` times the frequency-energy consistency loss (paper, FECL).

        Args:
            base: (N, ..., H, W), the prediction inside :meth:`disabled`, without gradient.
            fera: the prediction with the experts on; the only one that gets a gradient.
            target: what the prediction should be.

        Returns:
            A scalar, float32; float64 if any of the three is. The three may differ in dtype, as
            a bfloat16 prediction and a float32 target do under autocast.
        """
        dtype = torch.float64 if torch.float64 in (base.dtype, fera.dtype, target.dtype) else torch.float32
        base, fera, target = (t.to(dtype) for t in (base, fera, target))
        return self.config.fecl_weight * ops.fecl_loss(base, fera, target, self.config.bands)

    def bind_checkpointing(self) -> None:
        """Let the blocks' checkpointing functions carry the gate from now on, not from the next forward.

        Each forward does it by itself. Before ``torch.compile`` of a model with gradient checkpointing it saves a
        recompilation: a graph is compiled again once these functions are others.
        """
        self._routing.bind_checkpointing()

    def detach(self) -> None:
        """Give the model back as it was: its layers, its state dict, its ``requires_grad`` flags.

        The adapter keeps its parameters, and can still be saved. Detaching twice does nothing.
        """
        if not self._attached:
            return
        self._attached = False
        self._routing.remove()
        for path, layer in self.layers.items():
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, layer.base)
            layer.shared = None
        delattr(self.model, ROUTER_NAME)
        allow_saving(self.model)
        for parameter in self._asked:
            parameter.requires_grad_(True)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the adapter as safetensors, atomically.

        Args:
            path: a file if it ends with ``.safetensors``, else a directory, made if needed, in which
                ``fera_adapter.safetensors`` is written.

        Returns:
            The path of the file.

        Raises:
            OSError: it cannot be written; an older file is left as it was.
        """
        from fera_ext.checkpoint import save_adapter

        return save_adapter(self, path)

    def report(self) -> str:
        """What was adapted, in a few lines."""
        from fera_ext.adapter.matching import linear_paths

        config, count = self.config, len(self.layers)
        size = sum(p.numel() for p in self.parameters())
        total = len(linear_paths(self.model))
        lines = [
            f"{count} of {total} linears of {type(self.model).__name__} adapted, {size:,} parameters: "
            f"{config.num_experts} experts of rank {config.rank}, alpha {config.lora_alpha:g}, "
            f"{config.bands.name} bands ({config.bands.count})" + ("" if self._attached else "; detached")
        ]
        if isinstance(config.target_modules, str):
            lines.append(f"  /{config.target_modules}/: {count}")
        else:
            for target in config.target_modules:
                lines.append(f"  {target}: {sum(suffix_of(target, p) for p in self.layers)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"FeraAdapter({self.report().splitlines()[0]})"


def check_tensors(
    who: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> None:
    """Whether ``tensors`` are exactly what is expected.

    Raises:
        ValueError: keys missing or unknown, or a tensor of another shape or dtype.
    """
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        parts = [f"missing {listed(missing)}"] * bool(missing)
        parts += [f"unknown {listed(unknown)}"] * bool(unknown)
        raise ValueError(f"{who}: keys must be exactly the adapter's, got {'; '.join(parts)}")
    for name, (shape, dtype) in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{who}: {name} must be of shape {tuple(shape)}, got {tuple(tensors[name].shape)}")
        if tensors[name].dtype != dtype:
            raise ValueError(f"{who}: {name} must be {dtype}, got {tensors[name].dtype}")


def listed(names: list[str], most: int = 8) -> str:
    """Names for a message, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
