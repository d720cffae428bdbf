"""The demo's measurements: fine-tuning, the loss on held-out patches, sampling; no output."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.checkpoint import load_adapter
from fera_ext.config import FeraConfig
from fera_ext.demo.lora import Lora
from fera_ext.demo.photos import finetune_images, random_patches
from fera_ext.ops import frequency_energy

MODEL_DIR = Path(__file__).parent / "model"

CONFIG = FeraConfig(rank=4, num_experts=3, lora_alpha=12.0)
"""Rank-4 experts, weighted 1/3 each on average, act with scale 1, as LoRA of rank and alpha 12 does."""

ALPHA_LORA = 12.0
LEARNING_RATE = 1e-2
"""Peak, for both methods: of 2e-3, 5e-3 and 1e-2 the one with the lowest held-out loss for either."""

MAX_NORM = 0.02
"""Clip of the gradients, for both methods: about the norm of the squared error's gradient. The consistency
loss's gradient grows like one over the experts' output, which is tiny at first, and would fill the
optimizer's second moments for the whole of such a short run."""

BATCH = 16
EVALUATED = 384
LEVELS = 3
SAMPLES = 16
SAMPLING_STEPS = 25
CURVE_POINTS = 10

Tick = Callable[[list[float]], None]
"""Called after each step with the losses, if there are any."""

Methods = dict[str, tuple[nn.Module, FeraAdapter | Lora]]
"""By name, a model and what is attached to it."""


@dataclass
class Evaluation:
    """Squared error of the prediction on the held-out patches.

    Attributes:
        mean: over all patches, noises and timesteps.
        by_level: the same for each third of the timesteps, from little noise to much.
    """

    mean: float
    by_level: list[float]


@dataclass
class Training:
    """What one fine-tuning did.

    Attributes:
        parameters: how many were trained.
        losses: the squared error of each step's batch.
        curve: (step, held-out loss), from step 0 on.
        seconds: median wall time of a step.
        final: the evaluation after the last step.
    """

    parameters: int
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    final: Evaluation | None = None


@dataclass
class Sampling:
    """Images and what happened on the way.

    Attributes:
        images: (N, H, W, 3) uint8.
        raw: (N, 3, H, W), the images as the model gave them, to compare bits.
        timesteps: of the denoising steps, falling.
        energies: (steps, K), the latents' mean band energies, as shares.
        gates: (steps, E), the mean gates; empty without FeRA.
    """

    images: np.ndarray
    raw: Tensor
    timesteps: list[int]
    energies: list[list[float]]
    gates: list[list[float]]


class Experiment:
    """The model, the data and the random draws that both methods share.

    Args:
        seed: of every draw.
        device: where to compute.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        self.seed = seed
        self.device = device
        self.train_images, self.held_out_images = finetune_images()
        self.sampler = _sampler()
        self.scheduler = DDPMScheduler.from_config(self.sampler.config)
        rng = np.random.default_rng((seed, 1))
        held_out = torch.from_numpy(random_patches(self.held_out_images, EVALUATED, rng))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(held_out.shape, generator=generator)
        # One timestep for each stratum of the schedule: every noise level counts the same.
        strata = torch.arange(EVALUATED) + torch.rand(EVALUATED, generator=generator)
        steps = (strata * self.timestep_count / EVALUATED).long().clamp_(max=self.timestep_count - 1)
        order = torch.randperm(EVALUATED, generator=generator)
        self._held_out = self._noised(held_out[order], noise, steps)
        self._level = (steps * LEVELS // self.timestep_count).to(device)

    @property
    def timestep_count(self) -> int:
        """Timesteps of the noise schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    def new_model(self) -> nn.Module:
        """The shipped model, fresh from its file, float32."""
        from diffusers import UNet2DModel

        model = UNet2DModel.from_pretrained(MODEL_DIR, subfolder="unet")
        return model.to(self.device, torch.float32).eval()

    def _noised(self, clean: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The noisy patches, the timesteps and the targets (velocities), on the device."""
        noisy = self.scheduler.add_noise(clean, noise, steps)
        target = self.scheduler.get_velocity(clean, noise, steps)
        return noisy.to(self.device), steps.to(self.device), target.to(self.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The training batch of a step: the same for every method."""
        rng = np.random.default_rng((self.seed, 2, step))
        clean = torch.from_numpy(random_patches(self.train_images, BATCH, rng))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(clean.shape, generator=generator)
        steps = torch.randint(0, self.timestep_count, (BATCH,), generator=generator)
        return self._noised(clean, noise, steps)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """The held-out loss: patches, noises and timesteps are fixed."""
        errors = []
        for noisy, steps, target in zip(*(part.split(64) for part in self._held_out)):
            predicted = model(noisy, steps).sample
            errors.append((predicted - target).square().flatten(1).mean(1))
        error = torch.cat(errors)
        levels = [float(error[self._level == i].mean()) for i in range(LEVELS)]
        return Evaluation(float(error.mean()), levels)

    def new_fera(self, model: nn.Module) -> FeraAdapter:
        """FeRA on the model's attention, from the shared seed."""
        torch.manual_seed(self.seed)
        return attach(model, CONFIG)

    def new_lora(self, model: nn.Module, like: FeraAdapter) -> Lora:
        """LoRA on the same layers, with as many parameters as FeRA and its router, or barely more."""
        torch.manual_seed(self.seed)
        budget = sum(p.numel() for p in like.parameters())
        return Lora(model, like.matched, budget, ALPHA_LORA)

    def finetune(self, methods: Methods, steps: int, tick: Tick) -> dict[str, Training]:
        """Train adapters on the training patches, step by step in turn, so that their times are comparable.

        Args:
            methods: what to train; FeRA gets its consistency loss.
            steps: of each.
            tick: called after a step of all, with the last losses.
        """
        runs = {name: _Run(self, *method) for name, method in methods.items()}
        marks = {0, *(round(steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS))}
        for step in range(steps + 1):
            if step in marks:
                for run in runs.values():
                    run.result.final = self.evaluate(run.model)
                    run.result.curve.append((step, run.result.final.mean))
            if step == steps:
                break
            batch = self.batch(step)
            # A short warm-up, then linearly to a tenth: the last steps settle.
            rate = LEARNING_RATE * min(1.0, (step + 1) / 10) * (1.0 - 0.9 * step / steps)
            for run in runs.values():
                run.step(batch, rate)
            tick([run.result.losses[-1] for run in runs.values()])
        return {name: run.finish() for name, run in runs.items()}

    def now(self) -> float:
        """Wall time in seconds, once the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def sample(self, model: nn.Module, adapter: FeraAdapter | None, tick: Tick) -> Sampling:
        """Denoise the shared initial noise; with FeRA, each step's gate comes from its own latent."""
        scheduler = _sampler()
        scheduler.set_timesteps(SAMPLING_STEPS)
        generator = torch.Generator().manual_seed(self.seed + 1)
        side = int(model.config.sample_size)  # type: ignore[union-attr, arg-type]
        latents = torch.randn(SAMPLES, 3, side, side, generator=generator).to(self.device)
        energies, gates = [], []
        for t in scheduler.timesteps:
            energies.append(frequency_energy(latents, CONFIG.bands).mean(0).tolist())
            predicted = model(latents, t).sample
            if adapter is not None and adapter.gate is not None:
                gates.append(adapter.gate.mean(0).tolist())
            latents = scheduler.step(predicted, t, latents).prev_sample
            tick([])
        pixels = (latents.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return Sampling(images, latents.cpu(), scheduler.timesteps.tolist(), energies, gates)

    def reload_and_sample(self, path: Path, tick: Tick) -> Sampling:
        """Load a saved adapter into a fresh model and sample again, routing at inference time."""
        model = self.new_model()
        return self.sample(model, load_adapter(model, path), tick)

    def patches(self, held_out: bool) -> np.ndarray:
        """Some real patches, (N, H, W, 3) uint8, to look at."""
        images = self.held_out_images if held_out else self.train_images
        values = random_patches(images, SAMPLES, np.random.default_rng((self.seed, 3)))
        return np.rint(values * 127.5 + 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


class _Run:
    """One method's fine-tuning, a step at a time."""

    def __init__(self, experiment: Experiment, model: nn.Module, adapter: FeraAdapter | Lora) -> None:
        self.now = experiment.now
        self.model = model
        self.fera = adapter if isinstance(adapter, FeraAdapter) else None
        self.parameters = list(adapter.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)
        self.seconds: list[float] = []
        self.result = Training(sum(p.numel() for p in self.parameters))

    def step(self, batch: tuple[Tensor, Tensor, Tensor], rate: float) -> None:
        noisy, timesteps, target = batch
        start = self.now()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        base = None
        if self.fera is not None:
            with torch.no_grad(), self.fera.disabled():
                base = self.model(noisy, timesteps).sample
        predicted = self.model(noisy, timesteps).sample
        squared = functional.mse_loss(predicted, target)
        loss = squared
        if self.fera is not None and base is not None:
            loss = squared + self.fera.fecl_loss(base, predicted, target)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        self.seconds.append(self.now() - start)
        self.result.losses.append(squared.item())

    def finish(self) -> Training:
        self.result.seconds = statistics.median(self.seconds)
        return self.result


def _sampler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(MODEL_DIR, subfolder="scheduler")
