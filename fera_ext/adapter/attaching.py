"""Attach an adapter to a denoiser."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from fera_ext.adapter.adapter import ROUTER_NAME, FeraAdapter
from fera_ext.adapter.grouping import share_inputs
from fera_ext.adapter.guards import refuse_saving, wrapper_in
from fera_ext.adapter.matching import match, suffix_of
from fera_ext.adapter.routing import Routing
from fera_ext.architectures import Extract, extractor
from fera_ext.config import FeraConfig
from fera_ext.nn import FeraLinear, GateState, SoftFrequencyRouter
from fera_ext.nn.sharing import calls_of


def attach(
    model: nn.Module,
    config: FeraConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    latent: Extract | None = None,
    group_projections: bool = True,
) -> FeraAdapter:
    """Adapt a denoiser in place: freeze it, wrap the matching linears, route each forward by its latent.

    The base model's parameters stop asking for gradients; :meth:`FeraAdapter.detach` undoes everything.
    The adapter's parameters live in the model's tree (``model.fera_router`` and each wrapped linear's
    ``lora_A``, ``lora_B``), so wrappers such as DDP see them: attach first, wrap afterwards. One model runs
    in one thread at a time. While attached, ``save_pretrained`` of a diffusers model raises: no model could
    load what it would write.

    Not supported: a model that calls reentrant ``torch.utils.checkpoint`` itself, under DDP with
    ``static_graph=True``.

    Args:
        model: the denoiser itself, such as ``pipe.unet`` or ``pipe.transformer``.
        config: what to adapt and how; :class:`FeraConfig` with its defaults if not given.
        dtype: of the experts' parameters; float32 masters by default. The router's are float32.
        latent: for a forward that :mod:`fera_ext.architectures` does not know: a function of its
            arguments (args, kwargs, latent size) that returns the latent (B, ..., H, W).
        group_projections: run the projections of an attention that are given the same tensor (q, k and v of a
            self-attention, k and v of a cross-attention) as one operator, with one gradient to that tensor:
            the same results from fewer launches and passes over it. Compiled graphs, dropout on the experts' input
            and base layers other than a plain linear take the separate form. A backward pass through one of the
            projections frees what is kept for all of them: several passes want retain_graph. Not saved with the
            adapter.

    Returns:
        The adapter, a handle on what was attached.

    Raises:
        TypeError: ``model`` is not a module, or is or contains a wrapper: DDP, DataParallel, FSDP, a compiled model.
        ValueError: an adapter is attached already, no linear matches (near names are listed), or a match
            is no linear. The model is left as it was.
    """
    config = config or FeraConfig()
    check_model(model)
    if not dtype.is_floating_point:
        raise ValueError(f"attach: dtype must be a floating dtype, got {dtype}")
    if not isinstance(group_projections, bool):
        raise ValueError(f"attach: group_projections must be a bool, got {group_projections!r}")
    return attach_layers(model, config, match(model, config.target_modules), dtype, latent, group_projections)


def check_model(model: nn.Module) -> None:
    """Whether an adapter can be attached to ``model`` at all.

    Raises:
        TypeError: not a module, or a wrapper in it.
        ValueError: an adapter is attached already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "attach: model must be a torch.nn.Module, the denoiser itself (pipe.unet, pipe.transformer), "
            f"got {type(model).__name__}"
        )
    wrapper = wrapper_in(model)
    if wrapper is not None:
        raise TypeError(
            "attach: model must be the denoiser itself without wrappers (attach first, then "
            f"DistributedDataParallel or compile), got {type(wrapper).__name__}"
        )
    if any(isinstance(m, (FeraLinear, SoftFrequencyRouter)) for m in model.modules()):
        raise ValueError(
            f"attach: model must have no adapter, got a {type(model).__name__} with one attached (detach it first)"
        )
    if hasattr(model, ROUTER_NAME):
        raise ValueError(f"attach: model must have no attribute {ROUTER_NAME}, got one")


def attach_layers(
    model: nn.Module,
    config: FeraConfig,
    matched: Mapping[str, nn.Module],
    dtype: torch.dtype,
    latent: Extract | None,
    group_projections: bool,
) -> FeraAdapter:
    """:func:`attach` for layers already chosen and checked."""
    _warn_unmatched(config, matched)
    state = GateState()
    wrapped: dict[int, FeraLinear] = {}
    for module in matched.values():
        if id(module) not in wrapped:
            wrapped[id(module)] = FeraLinear(
                module,
                config.rank,
                config.num_experts,
                config.lora_alpha,
                config.lora_dropout,
                state,
                dtype=dtype,
                stream=len(wrapped),
            )
    layers = {path: wrapped[id(module)] for path, module in matched.items()}
    first = next(iter(layers.values()))
    router = SoftFrequencyRouter(
        config.bands.count,
        config.num_experts,
        config.router_hidden,
        config.router_tau,
        device=first.lora_A.device,
    )
    router.train(model.training)
    # Nothing above touches the model, so an error leaves it as it was.
    asked = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    model.add_module(ROUTER_NAME, router)
    if group_projections:
        share_inputs(model, layers, state)
    state.calls = calls_of(wrapped.values())
    refuse_saving(model)
    routing = Routing(model, router, config.bands, latent or extractor(model), state, layers)
    return FeraAdapter(model, config, layers, router, routing, asked)


def _warn_unmatched(config: FeraConfig, matched: Mapping[str, nn.Module]) -> None:
    if isinstance(config.target_modules, str):
        return
    missing = [t for t in config.target_modules if not any(suffix_of(t, p) for p in matched)]
    if missing:
        warnings.warn(
            f"attach: target_modules entries that match no layer: {', '.join(missing)}",
            stacklevel=4,
        )
