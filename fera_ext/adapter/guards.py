"""What must not happen to a model while an adapter is attached, and would otherwise go wrong in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from torch import nn
from torch.nn.parallel import DistributedDataParallel

PROJECTIONS = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})
"""The linears that a fused attention of diffusers no longer calls."""


class LayoutGuard:
    """Finds chunked feed-forwards and fused projections; the modules are collected once.

    Args:
        model: the denoiser, before or after its linears are wrapped.
        paths: the dotted paths of the adapted linears.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        chunking: dict[str, nn.Module] = {}
        fusing: dict[str, nn.Module] = {}
        for path in paths:
            for parent, child in _parents(path):
                # Only what is not attention runs in chunks.
                if not child.startswith("attn") and parent not in chunking:
                    module = model.get_submodule(parent)
                    if hasattr(module, "_chunk_size"):
                        chunking[parent] = module
            parent, _, name = path.rpartition(".")
            if name in PROJECTIONS and parent not in fusing:
                module = model.get_submodule(parent)
                if hasattr(module, "fused_projections"):
                    fusing[parent] = module
        self._chunking = tuple(chunking.items())
        self._fusing = tuple(fusing.items())

    def check(self, rows: int) -> None:
        """Before a forward whose gate has ``rows`` rows.

        Raises:
            RuntimeError: adapted layers that would see chunks of the batch, or not be called at all.
        """
        for path, module in self._fusing:
            if module.fused_projections and _fused(module):
                raise RuntimeError(
                    "FeraAdapter: attention projections must be separate while they are adapted (call "
                    f"unfuse_qkv_projections() or unfuse_projections()), got {path} with fused ones"
                )
        for path, module in self._chunking:
            # Axis 0 of (batch, tokens, channels): a chunk's rows no longer tell which gate is theirs.
            if module._chunk_size is not None and module._chunk_dim in (0, -3) and rows > 1:
                raise RuntimeError(
                    "FeraAdapter: feed-forward chunking must not be along the batch (dim=1, or "
                    f"disable_forward_chunking()) while the feed-forward is adapted, got {path} with "
                    f"chunk_size={module._chunk_size}, dim={module._chunk_dim}"
                )


def _parents(path: str) -> Iterator[tuple[str, str]]:
    """Each module above ``path``, with the name of its child on the way."""
    names = path.split(".")
    for depth in range(len(names)):
        yield ".".join(names[:depth]), names[depth]


def _fused(attention: nn.Module) -> bool:
    """Whether an attention with ``fused_projections`` set runs fused.

    ``unfuse_qkv_projections`` of models with diffusers' ``Attention`` gives the processors back and leaves
    the flag as it is; there the processor decides.
    """
    processor = getattr(attention, "processor", None)
    by_processor = any(c.__name__ == "Attention" for c in type(attention).__mro__)
    return not by_processor or type(processor).__name__.startswith("Fused")


def check_replica(model: nn.Module) -> None:
    """Whether ``model`` is what the adapter was attached to.

    Raises:
        RuntimeError: a replica that ``torch.nn.DataParallel`` made for a thread; replicas share one gate.
    """
    if getattr(model, "_is_replica", False):
        raise RuntimeError(
            "FeraAdapter: model must be run by one thread of a process (use DistributedDataParallel), "
            f"got a torch.nn.DataParallel replica of {type(model).__name__}"
        )


def wrapper_in(model: nn.Module) -> nn.Module | None:
    """A parallel, sharding or compiling wrapper that ``model`` is or contains, where attaching is wrong."""
    if hasattr(model, "_orig_mod"):
        return model
    for module in model.modules():
        if isinstance(module, (DistributedDataParallel, nn.DataParallel)):
            return module
        # By name: torch.distributed.fsdp is slow to import and absent from some builds.
        if any(c.__name__ in ("FullyShardedDataParallel", "FSDPModule") for c in type(module).__mro__):
            return module
    return None


class RefusedSave:
    """Stands for ``save_pretrained`` of an attached model, whose state dict no model could load.

    Args:
        own: what the instance had under that name, None where it is its class's method.
    """

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "save_pretrained: model must be without an adapter, got one with FeRA attached (call "
            "adapter.detach() to save the base model, adapter.save(path) to save the adapter)"
        )


def refuse_saving(model: nn.Module) -> None:
    """Make ``model.save_pretrained``, if there is one, raise."""
    if callable(getattr(model, "save_pretrained", None)):
        attributes = vars(model)
        attributes["save_pretrained"] = RefusedSave(attributes.get("save_pretrained"))


def allow_saving(model: nn.Module) -> None:
    """Undo :func:`refuse_saving`."""
    attributes = vars(model)
    refused = attributes.get("save_pretrained")
    if isinstance(refused, RefusedSave):
        if refused.own is None:
            del attributes["save_pretrained"]
        else:
            attributes["save_pretrained"] = refused.own
