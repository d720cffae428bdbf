"""Plain LoRA, for comparison: one low-rank update a layer, no experts, no router."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class LoraLinear(nn.Module):
    """y = base(x) + alpha / rank * (x Aᵀ) Bᵀ; B is zero at first, A Kaiming-uniform with a = √5.

    Args:
        base: the frozen linear.
        rank: of the update.
        alpha: the update's scale times the rank.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        update = functional.linear(functional.linear(x, self.lora_A), self.lora_B)
        return self.base(x) + self.scale * update


class Lora:
    """LoRA on some linears of a model, with a given number of parameters or barely more.

    Every layer gets the largest common rank that fits, and the first layers one rank more, until
    the budget is reached.

    Args:
        model: the denoiser; it is frozen and changed in place.
        paths: dotted paths of the linears to adapt.
        budget: the least number of trainable parameters.
        alpha: the update's scale times the rank.

    Raises:
        ValueError: the budget is less than rank one everywhere.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], budget: int, alpha: float) -> None:
        linears = {path: model.get_submodule(path) for path in paths}
        widths = {path: m.in_features + m.out_features for path, m in linears.items()}  # type: ignore[operator]
        total = sum(int(w) for w in widths.values())
        rank, rest = divmod(budget, total)
        if rank < 1:
            raise ValueError(f"Lora: budget must be at least {total}, got {budget}")
        model.requires_grad_(False)
        self.layers: dict[str, LoraLinear] = {}
        for path, linear in linears.items():
            extra = 1 if rest > 0 else 0
            rest -= extra * int(widths[path])
            layer = LoraLinear(linear, rank + extra, alpha)  # type: ignore[arg-type]
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
            self.layers[path] = layer

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train."""
        for layer in self.layers.values():
            yield layer.lora_A
            yield layer.lora_B
