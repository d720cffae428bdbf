"""How a clean latent becomes a noisy one, and what the model should say about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fera_ext.training.data import to_device
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
        steps = to_device(torch.randint(0, count, (len(clean),), generator=generator), clean.device)
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
        patch: side of the denoiser's tokens in latent pixels; a dynamic shift depends on their number.

    Raises:
        UsageError: ``snr_gamma`` is given.
    """

    def __init__(self, config: Any, snr_gamma: float | None, patch: int = 1) -> None:
        if snr_gamma is not None:
            raise UsageError(f"snr_gamma must not be given for a flow-matching model, got {snr_gamma}")
        self.config = config
        self.patch = patch
        self.count = int(config.get("num_train_timesteps", 1000))

    def shift(self, height: int, width: int) -> float:
        """How much more noise than logit-normal times a latent of this size is given, as when sampling."""
        get = self.config.get
        if not get("use_dynamic_shifting", False):
            return float(get("shift", 1.0) or 1.0)
        # As the pipelines' calculate_shift: the static shift is not applied on top of this one.
        tokens = (height // self.patch) * (width // self.patch)
        few, many = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
        low, high = get("base_shift", 0.5), get("max_shift", 1.15)
        mu = low + (high - low) * (tokens - few) / (many - few)
        return mu if get("time_shift_type", "exponential") == "linear" else math.exp(mu)

    def __call__(self, clean: Tensor, noise: Tensor, generator: torch.Generator) -> Noised:
        s = torch.sigmoid(torch.randn(len(clean), generator=generator))
        shift = self.shift(*clean.shape[-2:])
        s = to_device(shift * s / (1.0 + (shift - 1.0) * s), clean.device)
        mix = s.view(-1, *[1] * (clean.ndim - 1))
        latents = torch.lerp(clean, noise, mix)
        return Noised(latents, s * self.count, noise - clean, torch.ones_like(s))


def process_of(scheduler: Any, snr_gamma: float | None, patch: int = 1) -> Process:
    """The forward process that a pipeline's scheduler inverts.

    Args:
        scheduler: the pipeline's.
        snr_gamma: clip of the min-SNR weighting; None weighs all timesteps alike.
        patch: side of the denoiser's tokens in latent pixels.

    Raises:
        UsageError: a scheduler of another process, or one that does not go with ``snr_gamma``.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if "FlowMatch" in name:
        return FlowMatching(config, snr_gamma, patch)
    # EDM's schedulers scale what the model sees and says by sigma_data, and a continuous timestep is no index
    # of the betas: trained as DDPM such a model would learn to predict something else.
    betas = "beta_schedule" in config and "prediction_type" in config and "sigma_data" not in config
    if not betas or config.get("timestep_type", "discrete") != "discrete":
        raise UsageError(
            f"pretrained_model_name_or_path must have a scheduler with DDPM's betas or flow matching, got {name}"
        )
    return Diffusion(config, snr_gamma)
