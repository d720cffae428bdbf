"""How a clean latent becomes a noisy one, and what the model should say about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fera_ext.training.errors import UsageError


@dataclass(frozen=True)
class Noised:
    """One draw of the forward process.

    Attributes:
        latents: (B, C, H, W) float32, what the denoiser sees.
        timesteps: (B,), as the denoiser expects them.
        target: (B, C, H, W) float32, what the prediction should be.
        weight: (B,) float32, the weight of each sample's squared error.
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


class Process(Protocol):
    """A forward process. ``generator`` is on the CPU, so that a draw is the same on every device."""

    def __call__(self, clean: Tensor, noise: Tensor, generator: torch.Generator) -> Noised:
        """Noise ``clean`` (B, C, H, W) with ``noise``, at times drawn from ``generator``."""
        ...


class Diffusion:
    """Discrete DDPM: uniform timesteps; the target is the noise, the velocity or the clean latent.

    Args:
        config: the configuration of the pipeline's scheduler: its betas and its prediction type.
        snr_gamma: clip of the min-SNR weighting; None weighs all timesteps alike.

    Raises:
        UsageError: an unknown prediction type.
    """

    def __init__(self, config: Any, snr_gamma: float | None) -> None:
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler.from_config(config)
        self.kind = self.scheduler.config.prediction_type
        self.snr_gamma = snr_gamma
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise UsageError(f"prediction_type must be epsilon, v_prediction or sample, got {self.kind!r}")

    def __call__(self, clean: Tensor, noise: Tensor, generator: torch.Generator) -> Noised:
        count = self.scheduler.config.num_train_timesteps
        steps = torch.randint(0, count, (len(clean),), generator=generator).to(clean.device)
        latents = self.scheduler.add_noise(clean, noise, steps)
        if self.kind == "epsilon":
            target = noise
        elif self.kind == "v_prediction":
            target = self.scheduler.get_velocity(clean, noise, steps)
        else:
            target = clean
        return Noised(latents, steps, target, self._weight(steps))

    def _weight(self, steps: Tensor) -> Tensor:
        """Min-SNR: min(snr, gamma), relative to the weight that each prediction type implies."""
        if self.snr_gamma is None:
            return torch.ones(len(steps), device=steps.device)
        alpha = self.scheduler.alphas_cumprod.to(steps.device, torch.float32)[steps]
        snr = alpha / (1.0 - alpha)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.kind == "epsilon":
            # A schedule that ends at zero SNR would divide by zero, where the ratio's limit is one.
            return torch.where(snr > 0, clipped / snr.clamp(min=1e-20), torch.ones_like(snr))
        return clipped / (snr + 1.0) if self.kind == "v_prediction" else clipped


class FlowMatching:
    """Rectified flow: x = (1 - s) clean + s noise, target noise - clean, s logit-normal and shifted.

    Args:
        config: the configuration of the pipeline's scheduler: its shift and number of timesteps.
        snr_gamma: must be None: there is no such weighting here.

    Raises:
        UsageError: ``snr_gamma`` is given.
    """

    def __init__(self, config: Any, snr_gamma: float | None) -> None:
        if snr_gamma is not None:
            raise UsageError(f"snr_gamma must not be given for a flow-matching model, got {snr_gamma}")
        self.shift = float(config.get("shift", 1.0) or 1.0)
        self.count = int(config.get("num_train_timesteps", 1000))

    def __call__(self, clean: Tensor, noise: Tensor, generator: torch.Generator) -> Noised:
        s = torch.sigmoid(torch.randn(len(clean), generator=generator))
        s = (self.shift * s / (1.0 + (self.shift - 1.0) * s)).to(clean.device)
        mix = s.view(-1, *[1] * (clean.ndim - 1))
        latents = torch.lerp(clean, noise, mix)
        return Noised(latents, s * self.count, noise - clean, torch.ones_like(s))


def process_of(scheduler: Any, snr_gamma: float | None) -> Process:
    """The forward process that a pipeline's scheduler inverts."""
    flow = "FlowMatch" in type(scheduler).__name__
    return (FlowMatching if flow else Diffusion)(scheduler.config, snr_gamma)
