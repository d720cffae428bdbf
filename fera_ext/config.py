"""The frozen configuration of an adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from fera_ext.bands import Bands

MAX_EXPERTS = 32
"""The most experts the operators take."""

MAX_HIDDEN = 256
"""The widest router hidden layer the operators take."""

MAX_STACKED_RANK = 512
"""The largest num_experts * rank the operators take."""


@dataclass(frozen=True)
class FeraConfig:
    """What to adapt and how; saved with every adapter.

    Attributes:
        rank: r, the rank of each expert; num_experts * rank may be at most 512.
        lora_alpha: the update's scale is lora_alpha / rank.
        lora_dropout: dropout on the experts' input while training, in [0, 1).
        num_experts: E, from 1 to 32.
        bands: the definition of the frequency bands (paper, frequency-energy indicator).
        router_hidden: width of the router's hidden layer, from 1 to 256.
        router_tau: temperature of the router's softmax, positive.
        fecl_weight: factor of the consistency loss in :meth:`fera_ext.adapter.FeraAdapter.fecl_loss`.
        target_modules: which linears to adapt. A list: dotted path suffixes, ``"to_out.0"`` matches
            ``mid_block.attn1.to_out.0``. A string: a regular expression that must match the whole path.

    Raises:
        ValueError: a value outside these ranges.
    """

    rank: int = 4
    lora_alpha: float = 1.0
    lora_dropout: float = 0.0
    num_experts: int = 3
    bands: Bands = field(default_factory=lambda: Bands.dog(3))
    router_hidden: int = 64
    router_tau: float = 0.7
    fecl_weight: float = 0.1
    target_modules: Sequence[str] | str = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        _integer("rank", self.rank, MAX_STACKED_RANK)
        _integer("num_experts", self.num_experts, MAX_EXPERTS)
        _integer("router_hidden", self.router_hidden, MAX_HIDDEN)
        if self.rank * self.num_experts > MAX_STACKED_RANK:
            raise ValueError(
                f"FeraConfig: num_experts * rank must be at most {MAX_STACKED_RANK}, "
                f"got {self.num_experts} * {self.rank}"
            )
        _number("lora_alpha", self.lora_alpha, "positive", lambda v: v > 0)
        _number("router_tau", self.router_tau, "positive", lambda v: v > 0)
        _number("lora_dropout", self.lora_dropout, "in [0, 1)", lambda v: 0 <= v < 1)
        _number("fecl_weight", self.fecl_weight, "non-negative", lambda v: v >= 0)
        if not isinstance(self.bands, Bands):
            raise ValueError(f"FeraConfig: bands must be a Bands, got {self.bands!r}")
        object.__setattr__(self, "target_modules", _targets(self.target_modules))

    @property
    def scale(self) -> float:
        """s = lora_alpha / rank."""
        return self.lora_alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; masks of custom bands travel separately, as a tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["bands"] = self.bands.to_dict()
        return values

    @staticmethod
    def from_dict(data: dict[str, Any], masks: torch.Tensor | None = None) -> FeraConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            data: what :meth:`to_dict` gave.
            masks: (K, H, W//2+1), for custom bands only.

        Raises:
            ValueError: an unknown or missing field, or a value outside its range.
        """
        known = {f.name for f in fields(FeraConfig)}
        if set(data) != known:
            raise ValueError(
                f"FeraConfig: fields must be exactly {', '.join(sorted(known))}, got {_difference(known, set(data))}"
            )
        return FeraConfig(**{**data, "bands": Bands.from_dict(data["bands"], masks)})

    def override(self, **changes: Any) -> FeraConfig:
        """A copy with some fields changed.

        Raises:
            ValueError: an unknown field, or a value outside its range.
        """
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            raise ValueError(
                f"FeraConfig: fields must be among {', '.join(f.name for f in fields(self))}, got {', '.join(unknown)}"
            )
        return replace(self, **changes)


def _integer(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"FeraConfig: {name} must be an integer from 1 to {most}, got {value!r}")


def _number(name: str, value: Any, rule: str, holds: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not holds(value):
        raise ValueError(f"FeraConfig: {name} must be a finite number, {rule}, got {value!r}")


def _targets(targets: object) -> list[str] | str:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"FeraConfig: target_modules must be a valid regular expression, got {targets!r} ({error})"
            ) from None
        if targets:
            return targets
    elif isinstance(targets, Sequence) and targets and all(isinstance(t, str) and t.strip(".") for t in targets):
        return list(targets)
    raise ValueError(
        f"FeraConfig: target_modules must be a list of path suffixes or a regular expression, got {targets!r}"
    )


def _difference(expected: set[str], got: set[str]) -> str:
    missing, extra = sorted(expected - got), sorted(got - expected)
    parts = [f"missing {', '.join(missing)}"] * bool(missing)
    parts += [f"unknown {', '.join(extra)}"] * bool(extra)
    return "; ".join(parts)
