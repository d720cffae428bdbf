"""Models whose projections share their input, attached in groups and one by one, and a counter of operator calls."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import torch
from helpers_models import Case, latents, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig

PROJECTIONS = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]
# Rings tell small latents apart; the default bands see them all as low frequencies.
CONFIG = FeraConfig(target_modules=r".*\.(" + "|".join(PROJECTIONS) + r"|to_out\.0)", bands=Bands.rings(3))


class Calls(TorchDispatchMode):
    """Counts the operators' calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fera_ext":
            self.count[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))

    def linears(self) -> tuple[int, int]:
        """Calls of the group and of the single operator since the last question."""
        found = self.count["expert_linear_group"], self.count["expert_linear"]
        self.count.clear()
        return found


class Attention(nn.Module):
    """Attention of one's own, which does not say what its projections are given.

    Attributes:
        between: called with the input after the query.
    """

    def __init__(self, width: int, inner: Callable[[Attention, Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.inner = inner

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + nn.functional.scaled_dot_product_attention(*self.inner(self, x, context))


def itself(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    return a.to_q(x), a.to_k(x), a.to_v(x)


def cross(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    return a.to_q(x), a.to_k(context), a.to_v(context)


class Denoiser(nn.Module):
    """Two attentions to the latent's own tokens, or to others; may checkpoint its blocks itself."""

    def __init__(self, inner: Callable[..., tuple[Tensor, ...]], width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(width, inner) for _ in range(2)])
        self.reentrant: bool | None = None

    def forward(self, z: Tensor) -> Tensor:
        x = z.flatten(2).transpose(1, 2)
        for block in self.blocks:
            context = torch.tanh(x[:, :5])
            if self.reentrant is None:
                x = block(x, context)
            else:
                x = checkpoint(block, x, context, use_reentrant=self.reentrant)
        return x.transpose(1, 2).reshape(z.shape)


def denoiser(inner: Callable[..., tuple[Tensor, ...]]) -> Case:
    torch.manual_seed(0)
    z = latents(2, 8, 6, 4)
    return Case(Denoiser(inner), {"z": z}, ("z",), z)


def pair(make: Callable[[], Case]) -> Iterator[tuple[Case, FeraAdapter]]:
    """The same model twice: in groups, and one by one."""
    for grouped in (True, False):
        case = make()
        adapter = attach(case.model, CONFIG, group_projections=grouped)
        randomise(adapter)
        yield case, adapter


def gradients(case: Case, adapter: FeraAdapter) -> tuple[Tensor, dict[str, Tensor]]:
    for parameter in adapter.parameters():
        parameter.grad = None
    out = case.run()
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in adapter.named_parameters()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    largest = max(float(g.norm()) for g in want.values())
    for name, value in want.items():
        # The same sums in another order: a few float32 roundings, which is all that is left of a zero gradient.
        assert float((got[name] - value).norm()) <= 2e-5 * float(value.norm()) + 1e-7 * largest, name


def groups(adapter: FeraAdapter) -> list[Any]:
    return list(dict.fromkeys(layer.shared for layer in adapter.layers.values() if layer.shared is not None))


def nothing_kept(adapter: FeraAdapter) -> bool:
    return not adapter._routing.state.holding and all(group._kept is None for group in groups(adapter))


def key_elsewhere(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    return a.to_q(x), a.to_k(torch.sin(x)), a.to_v(x)


def equal_but_another(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    return a.to_q(x), a.to_k(x.clone()), a.to_v(x.clone())


def no_key(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    return a.to_q(x), x, a.to_v(x)


def twice(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    return a.to_q(x) + a.to_q(x), a.to_k(x) + a.to_k(x), a.to_v(x)
