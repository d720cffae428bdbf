"""What is attached to a denoiser in turn: nothing, PEFT's LoRA, the published pattern, FeRA.

A contender is attached to the shared frozen model, gives the loss of one batch, and leaves the model as it was.

dtypes: the frozen model and its inputs are in the run's dtype. PEFT's adapters are float32 under autocast, what PEFT
makes of 16-bit models by default and what mixed precision asks for; ``peft-bf16`` are adapters in the model's dtype
without autocast. The operators take float32 adapters with 16-bit inputs, so FeRA needs no autocast; ``fera-autocast``
runs under it all the same, as a trainer built on accelerate does. ``peft-tensors`` is ``peft-bf16`` as
diffusers' scripts train it: clipped and updated tensor by tensor. ``fera-bf16`` holds its adapters in the model's dtype
as ``peft-bf16`` does, with gradients and AdamW's states of that dtype; its router stays float32. The published pattern
casts its float32 adapters at each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fera_ext import FeraConfig, attach
from fera_ext.adapter.matching import match
from fera_ext.bands import Bands
from fera_ext.bench.cases import TAU
from fera_ext.bench.peers_expert import published_update
from fera_ext.bench.peers_published import PublishedRouter, published_fecl
from fera_ext.bench.step_models import Batch, Denoise
from fera_ext.training.flat import FlatParameters

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
HIDDEN = 64
FECL_WEIGHT = 0.1


class Absence(Exception):
    """A contender does not exist for a model; the message says why."""


class Trainee:
    """A denoiser with a contender attached; this one is the frozen model itself.

    Args:
        model: the frozen denoiser.
        batch: what it is trained on.
        experts, rank: E and r.

    Attributes:
        parameters: what is trained.
        flat: the same as a few tensors, which are what is clipped and updated; of every contender with ``flatten``.
    """

    flat: FlatParameters | None = None
    flatten = True
    capturable = compilable = True

    def __init__(self, model: nn.Module, batch: Batch, experts: int, rank: int) -> None:
        self.model = model
        self.batch = batch
        self.experts, self.rank = experts, rank
        self.parameters: list[nn.Parameter] = []

    def context(self) -> AbstractContextManager[Any]:
        """Autocast, where the contender runs under it."""
        return nullcontext()

    def predict(self, denoise: Denoise) -> Tensor:
        """The prediction for the batch."""
        with self.context():
            return self.batch.predict(denoise)

    def loss(self, denoise: Denoise) -> Tensor:
        """The loss of the batch, a float32 scalar."""
        return F.mse_loss(self.predict(denoise).float(), self.batch.target)

    def detach(self) -> None:
        """Leaves the model as it was."""


class Frozen(Trainee):
    """Forward, and backward to the input latent; nothing is trained: the floor of every contender."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.latent: Tensor = self.batch.latent.detach().clone().requires_grad_()

    def predict(self, denoise: Denoise) -> Tensor:
        """The prediction, with a graph down to :attr:`latent`."""
        return self.batch.predict(denoise, self.latent)


class Peft(Trainee):
    """PEFT's LoRA of rank E·r on the same linears, float32 under autocast."""

    cast = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise Absence("the package peft is not installed") from None
        self._linears = match(self.model, TARGETS)
        self._had = set(vars(self.model))
        rank = self.experts * self.rank
        try:
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), self.model)
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(torch.float32 if self.cast else self.batch.latent.dtype)
                    parameter.requires_grad_(True)
                    self.parameters.append(parameter)
                else:
                    parameter.requires_grad_(False)
        except BaseException:
            self.detach()
            raise

    def context(self) -> AbstractContextManager[Any]:
        """Autocast, unless the adapters have the model's dtype."""
        return _autocast(self.batch) if self.cast else nullcontext()

    def detach(self) -> None:
        """Puts the linears back, and what PEFT has left on the model away."""
        _put(self.model, self._linears)
        for name in set(vars(self.model)) - self._had:
            delattr(self.model, name)


class Peft16(Peft):
    """The same with adapters in the model's dtype, without autocast."""

    cast = False


class PeftTensors(Peft16):
    """That, clipped and updated tensor by tensor."""

    flatten = False


def _autocast(batch: Batch) -> AbstractContextManager[Any]:
    dtype, device = batch.latent.dtype, batch.latent.device
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _put(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Sets each module at its dotted path."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)


class _PublishedLinear(nn.Module):
    """A linear with a pair of linears an expert beside it; ``gates`` holds the gate (B, E) of the running forward, or
    nothing: then it is the linear alone."""

    def __init__(self, base: nn.Linear, experts: int, rank: int, gates: list[Tensor]) -> None:
        super().__init__()
        self.base, self.gates = base, gates
        device = base.weight.device
        downs = [torch.empty(rank, base.in_features, device=device) for _ in range(experts)]
        for down in downs:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        ups = [torch.zeros(base.out_features, rank, device=device) for _ in range(experts)]
        self.pairs = nn.ParameterList([*downs, *ups])

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., in) to (B, ..., out)"""
        base: Tensor = self.base(x)
        return base + published_update(x, self.gates[0], *self.pairs) if self.gates else base


class Published(Trainee):
    """The published code's pattern, rewritten plainly, on the same four linears of an attention."""

    # Its Gaussian kernels are made on the CPU at each call.
    capturable = compilable = False
    count = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        latent = self.batch.latent
        if latent.ndim != 4:
            raise Absence("the published code takes latents of four axes alone")
        device = latent.device
        weights = [torch.empty(HIDDEN, self.count, device=device), torch.empty(self.experts, HIDDEN, device=device)]
        self.router = PublishedRouter(self.count, (weights[0], weights[0], weights[1], weights[1]))
        self._linears = match(self.model, TARGETS)
        self._gates: list[Tensor] = []
        # All are made before the first is put into the model, so an error leaves that as it was.
        layers: dict[str, nn.Module] = {
            path: _PublishedLinear(base, self.experts, self.rank, self._gates)  # type: ignore[arg-type]
            for path, base in self._linears.items()
        }
        _put(self.model, layers)
        self.parameters = [p for layer in layers.values() for p in layer.pairs]  # type: ignore[union-attr]
        self.parameters += list(self.router.layers.parameters())

    def predict(self, denoise: Denoise) -> Tensor:
        """The gate, then the prediction."""
        gate = self.router(self.batch.latent, *self.router.layers.parameters())
        self._gates[:] = [gate]
        try:
            return super().predict(denoise)
        finally:
            self._gates.clear()

    def detach(self) -> None:
        """Puts the linears back."""
        _put(self.model, self._linears)


class PublishedFecl(Published):
    """The same with its consistency loss; the base prediction comes first, without gradient."""

    def loss(self, denoise: Denoise) -> Tensor:
        """Squared error and consistency loss."""
        with torch.no_grad():
            base = self.batch.predict(denoise)
        prediction, target = self.predict(denoise).float(), self.batch.target
        fecl = published_fecl(base, prediction, target, self.count)
        return F.mse_loss(prediction, target) + FECL_WEIGHT * fecl


class Fera(Trainee):
    """``fera_ext.attach`` with its defaults: float32 adapters, no autocast."""

    cast = False
    masters = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        config = FeraConfig(
            rank=self.rank,
            num_experts=self.experts,
            router_hidden=HIDDEN,
            router_tau=TAU,
            bands=Bands.dog(3),
            fecl_weight=FECL_WEIGHT,
            target_modules=TARGETS,
        )
        dtype = torch.float32 if self.masters else self.batch.latent.dtype
        self.adapter = attach(self.model, config, dtype=dtype)
        self.adapter.latent_size = self.batch.latent_size  # FLUX: no host synchronisation
        self.parameters = list(self.adapter.parameters())

    def context(self) -> AbstractContextManager[Any]:
        """Nothing, or autocast where it is asked for."""
        return _autocast(self.batch) if self.cast else nullcontext()

    def detach(self) -> None:
        """``adapter.detach()``"""
        self.adapter.detach()


class FeraAutocast(Fera):
    """The same under autocast."""

    cast = True


class Fera16(Fera):
    """The same with adapters in the model's dtype."""

    masters = False


class FeraFecl(Fera):
    """FeRA with its consistency loss; the base prediction comes first, without gradient."""

    def loss(self, denoise: Denoise) -> Tensor:
        """Squared error and consistency loss."""
        with torch.no_grad(), self.adapter.disabled():
            base = self.predict(denoise)
        prediction, target = self.predict(denoise).float(), self.batch.target
        parts = [self.batch.as_latent(part) for part in (base, prediction, target)]
        return F.mse_loss(prediction, target) + self.adapter.fecl_loss(*parts)


CONTENDERS: dict[str, Callable[..., Trainee]] = {
    "forward": Trainee,
    "frozen": Frozen,
    "peft": Peft,
    "peft-bf16": Peft16,
    "peft-tensors": PeftTensors,
    "published": Published,
    "published+fecl": PublishedFecl,
    "fera": Fera,
    "fera-bf16": Fera16,
    "fera-autocast": FeraAutocast,
    "fera+fecl": FeraFecl,
}
PEFTS = ("peft", "peft-bf16")
DEFAULT = ("forward", "frozen", *PEFTS, "published", "fera", "fera-bf16", "fera+fecl")
ALIKE = {"fera": "peft", "fera-bf16": "peft-bf16"}
"""The PEFT whose adapters, gradients and optimiser states are of the same dtype: whose memory is compared."""
SAMPLERS = ("frozen", "peft", "fera")
"""Those a sampling loop is timed for."""


def is_fera(name: str) -> bool:
    """Whether a contender is this library's."""
    return name.startswith("fera")


@contextmanager
def attached(name: str, model: nn.Module, batch: Batch, experts: int, rank: int) -> Iterator[Trainee]:
    """The contender on the model, which is as it was afterwards.

    Raises:
        Absence: there is no such contender for the model.
    """
    torch.manual_seed(0)
    trainee = CONTENDERS[name](model, batch, experts, rank)
    try:
        if trainee.parameters and trainee.flatten:
            trainee.flat = FlatParameters(trainee.parameters)
        yield trainee
    finally:
        trainee.detach()
