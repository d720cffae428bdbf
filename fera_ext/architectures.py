"""Where each architecture's forward holds the latent: one line of :data:`ARCHITECTURES` a model class.

The gate is computed from the noisy latent. An entry maps the arguments of a call to the latent
``(B, ..., H, W)``. A class that is not here is taken by the name of a parent class that is, else its forward's
first argument must be the latent.

UNets that take conditioning channels beside the latent (inpainting, InstructPix2Pix, depth, upscaling, SVD) have
more input than output channels; their pipelines put the noisy latent first, so its ``out_channels`` channels are
the latent and the rest is left out. A pipeline with another order (Marigold: the image first) needs ``attach``'s
``latent`` function.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


class LatentSize:
    """The latent's height and width where the tokens do not say: given by the user, or read once.

    Attributes:
        given: (height, width) in latent pixels, or None to read it from the position ids.
    """

    def __init__(self) -> None:
        self.given: tuple[int, int] | None = None
        self._ids: weakref.ref[Tensor] | None = None
        self._version = -1
        self._size = (0, 0, 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentSize:
        copied = LatentSize()
        copied.given = self.given
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_size, (self.given,)

    def from_ids(self, ids: Tensor) -> tuple[int, int, int]:
        """(tokens, height, width) in patches of the leading image of ``ids``, (T, 3) or (B, T, 3).

        Tokens whose first coordinate differs from the first token's belong to reference images.
        Reading costs one host synchronisation, so the answer is kept as long as ``ids`` is the same
        tensor, unmodified.
        """
        tracked = not ids.is_inference()
        if tracked and self._ids is not None and self._ids() is ids and self._version == ids._version:
            return self._size
        table = (ids if ids.ndim == 2 else ids[0]).detach().cpu()
        other = (table[:, 0] != table[0, 0]).nonzero()
        tokens = int(other[0]) if len(other) else len(table)
        height = int(table[:tokens, 1].max()) + 1
        width = int(table[:tokens, 2].max()) + 1
        self._size = (tokens, height, width)
        if tracked:
            self._ids, self._version = weakref.ref(ids), ids._version
        return self._size


def _restore_size(given: tuple[int, int] | None) -> LatentSize:
    size = LatentSize()
    size.given = given
    return size


Extract = Callable[[tuple[Any, ...], Mapping[str, Any], LatentSize], Any]
"""(args, kwargs, latent size) of a forward to its latent."""


@dataclass(frozen=True)
class Argument:
    """The forward's first argument.

    Attributes:
        name: what it is called.
    """

    name: str

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: LatentSize) -> Any:
        return args[0] if args else kwargs.get(self.name)


@dataclass(frozen=True)
class NoisyChannels(Argument):
    """The noisy latent's channels of the forward's first argument, (B, C, H, W) or (B, F, C, H, W).

    Attributes:
        channels: how many of the leading channels are the noisy latent's; None for all.
    """

    channels: int | None = None

    def of(self, model: nn.Module) -> NoisyChannels:
        """The same for ``model``: ``out_channels`` where its configuration has more input channels."""
        config = getattr(model, "config", None)
        taken, given = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
        if isinstance(taken, int) and isinstance(given, int) and taken > given:
            return replace(self, channels=given)
        return self

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: LatentSize) -> Any:
        latent = super().__call__(args, kwargs, size)
        if self.channels is None or not isinstance(latent, Tensor) or latent.ndim not in (4, 5):
            return latent
        return latent[..., : self.channels, :, :]


def packed_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], size: LatentSize) -> Tensor:
    """FLUX: tokens (B, T, 4C) of 2 x 2 patches to (B, C, H, W).

    H/2 and W/2 are one more than the largest row and column of ``img_ids``, or half the user's size.

    Raises:
        ValueError: a number of tokens that is not (H/2) * (W/2).
    """
    tokens = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[2] % 4:
        raise ValueError(f"latent: hidden_states must be (B, T, 4C) packed tokens, got {_describe(tokens)}")
    if size.given is not None:
        height, width = size.given[0] // 2, size.given[1] // 2
        count = height * width
    else:
        ids = args[4] if len(args) > 4 else kwargs.get("img_ids")
        if not isinstance(ids, Tensor) or ids.ndim not in (2, 3) or ids.shape[-1] != 3:
            raise ValueError(f"latent: img_ids must be (T, 3), got {_describe(ids)}")
        count, height, width = size.from_ids(ids)
    if count != height * width or count > tokens.shape[1]:
        source = "adapter.latent_size" if size.given is not None else "img_ids"
        raise ValueError(
            f"latent: {source} must give a height * width of the {tokens.shape[1]} tokens, "
            f"got {height} * {width} patches"
        )
    patches = tokens[:, :count].reshape(tokens.shape[0], height, width, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, 2 * height, 2 * width)


ARCHITECTURES: dict[str, Extract] = {
    "UNet2DConditionModel": NoisyChannels("sample"),
    "UNet2DModel": NoisyChannels("sample"),
    "UNetSpatioTemporalConditionModel": NoisyChannels("sample"),
    "SD3Transformer2DModel": Argument("hidden_states"),
    "FluxTransformer2DModel": packed_tokens,
    "DiTTransformer2DModel": Argument("hidden_states"),
    "PixArtTransformer2DModel": Argument("hidden_states"),
}
"""Class name to the function that finds the latent."""


def extractor(model: nn.Module) -> Extract:
    """The entry of the model's class or of its nearest parent, else its forward's first argument."""
    for parent in type(model).__mro__:
        if parent.__name__ in ARCHITECTURES:
            entry = ARCHITECTURES[parent.__name__]
            return entry.of(model) if isinstance(entry, NoisyChannels) else entry
    return Argument(_first_parameter(type(model)))


def _first_parameter(model_class: type[nn.Module]) -> str:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [
        name
        for name, parameter in inspect.signature(model_class.forward).parameters.items()
        if parameter.kind in positional
    ]
    return names[1] if len(names) > 1 else ""


def check_latent(latent: Any, model: nn.Module) -> Tensor:
    """The latent, if it is one.

    Raises:
        ValueError: not a floating tensor (B, ..., H, W) with four axes or more.
    """
    if not isinstance(latent, Tensor) or latent.ndim < 4 or not latent.is_floating_point() or 0 in latent.shape:
        raise ValueError(
            f"latent: the first argument of {type(model).__name__} must be a floating tensor "
            f"(B, ..., H, W) with 4 axes or more, got {_describe(latent)}; "
            "another layout needs a line in fera_ext.architectures.ARCHITECTURES"
        )
    return latent


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


__all__ = ["ARCHITECTURES", "Argument", "Extract", "LatentSize", "NoisyChannels", "extractor", "packed_tokens"]
