"""One training step as a function of tensors: predictions, losses, gradients, clipping, update.

All that differs from one step to the next is an input: noisy latents, times, targets, conditioning, and as tensors
too the consistency loss's ramp and the learning rate. So one CUDA graph holds a step, and a compiled model is not
compiled again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fera_ext.adapter import FeraAdapter
from fera_ext.training.captured import CapturedStep, Recorder
from fera_ext.training.errors import UsageError, first_line
from fera_ext.training.families import Conditioning, Family
from fera_ext.training.flat import FlatParameters
from fera_ext.training.noising import Noised
from fera_ext.training.settings import Settings

CONDITION = "condition."
"""What the names of conditioning inputs begin with."""

BACKEND = "inductor"
"""What compiles the denoiser."""

RECORDER: Recorder | None = None
"""What records the step; None for CUDA graphs."""


def check_speed(settings: Settings, device: torch.device, processes: int) -> None:
    """Whether the step can be compiled or recorded as asked.

    Raises:
        UsageError: not on this device, or not in several processes.
    """
    if settings.cuda_graph and device.type != "cuda" and RECORDER is None:
        raise UsageError(f"cuda_graph must be used with a GPU, got {device.type}")
    for name in ("compile", "cuda_graph"):
        if getattr(settings, name) and processes > 1:
            raise UsageError(f"{name} must be used with one process, got {processes}")


def checkpoint_blocks(denoiser: Any, random: bool) -> None:
    """Switch gradient checkpointing on.

    Args:
        denoiser: a diffusers model.
        random: whether its blocks draw random numbers, which a recomputation must draw again. Where they do not,
            the generator's state is left alone: saving it is work, and not possible inside a CUDA graph.

    Raises:
        UsageError: the model has no such thing.
    """
    try:
        if random:
            denoiser.enable_gradient_checkpointing()
        else:
            denoiser.enable_gradient_checkpointing(_checkpoint)
    except (AttributeError, ValueError) as error:
        raise UsageError(f"gradient_checkpointing: {first_line(error)}") from error


def _checkpoint(block: nn.Module, *args: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=False)


class Step:
    """The step of one run, with its optimizer.

    Args:
        settings: what to do.
        accelerator: device, precision and processes.
        family: the model.
        adapter: attached to the family's denoiser.
    """

    def __init__(self, settings: Settings, accelerator: Any, family: Family, adapter: FeraAdapter) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.family = family
        self.adapter = adapter
        self.base: Any = family.denoiser
        if settings.compile:
            adapter.bind_checkpointing()
            # A wrapper beside the denoiser: validation draws other batch sizes, with the model as it is.
            self.base = torch.compile(family.denoiser, fullgraph=True, dynamic=False, backend=BACKEND)
        self.model = self.base
        if accelerator.num_processes > 1:
            self.model = accelerator.prepare_model(family.denoiser)
        # After that: preparing may give the parameters new memory. Its hooks are on the parameters, not on that.
        self.flat = FlatParameters(adapter.parameters())
        device = accelerator.device
        self.optimizer = torch.optim.AdamW(
            self.flat.parameters(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
            fused=device.type in ("cpu", "cuda"),
            capturable=settings.cuda_graph and device.type == "cuda",
        )
        # The graph's warm-up steps run eagerly on purpose.
        self.optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        self._captured = CapturedStep(self._step, device, recorder=RECORDER) if settings.cuda_graph else None

    def __call__(
        self, noised: Noised, conditioning: Conditioning, number: int, seed: int, *, first: bool, last: bool
    ) -> Tensor:
        """One forward and backward pass, and the update where the gradients are complete.

        Args:
            noised: the batch.
            conditioning: what the denoiser is told besides; a first axis of one serves the whole batch.
            number: how many updates there have been.
            seed: of the random numbers that the model draws.
            first: whether the gradients start here, else they are added to those of the passes before.
            last: whether to update.

        Returns:
            Loss, squared error, FECL and each expert's mean gate, (3 + E,), on the device.
        """
        s = self.settings
        if self.family.packed:
            # Else it is read from the position ids, on the host.
            self.adapter.latent_size = (noised.latents.shape[-2], noised.latents.shape[-1])
        inputs: dict[str, Tensor | float] = {
            "latents": noised.latents,
            "timesteps": noised.timesteps,
            "target": noised.target,
            "weight": noised.weight,
            # FECL's gradient grows like one over the experts' output, which is tiny at first; at full weight it would
            # drown the squared error and fill the optimizer's second moments for long.
            "ramp": min(1.0, (number + 1) / (s.fecl_warmup_steps + 1)),
            "rate": float(self.optimizer.param_groups[0]["lr"]),
            **{CONDITION + name: value for name, value in conditioning.items()},
        }
        consistency = "none"
        if self.adapter.config.fecl_weight > 0 and number % s.fecl_every == 0:
            consistency = "start" if number == 0 else "base"
        torch.manual_seed(seed)
        if self._captured is not None:
            run = self._captured.eager if consistency == "start" else self._captured
            return run(inputs, first=first, last=last, consistency=consistency)
        device = self.accelerator.device
        tensors = {k: v if isinstance(v, Tensor) else torch.full((), v, device=device) for k, v in inputs.items()}
        return self._step(tensors, first=first, last=last, consistency=consistency)

    def _step(self, inputs: Mapping[str, Tensor], *, first: bool, last: bool, consistency: str) -> Tensor:
        """The part that a CUDA graph holds.

        ``consistency`` says where FECL's base prediction comes from: "base", the base model; "start", the prediction
        itself, because a new adapter changes nothing yet; "none", no FECL.
        """
        s, family, adapter, accelerator = self.settings, self.family, self.adapter, self.accelerator
        latents, timesteps, target = inputs["latents"], inputs["timesteps"], inputs["target"]
        told = {k.removeprefix(CONDITION): v for k, v in inputs.items() if k.startswith(CONDITION)}
        rows = math.ceil(round(s.fecl_share * len(latents), 9))  # 0.28 of 25 is 7, not 7.000000000000001
        rows = max(rows, 1)
        base = None
        with accelerator.autocast():
            if consistency == "base":
                # The base layers alone, and nothing is kept for a backward pass.
                with torch.no_grad(), adapter.disabled():
                    few = {k: v[:rows] for k, v in told.items()}
                    base = family.predict(self.base, latents[:rows], timesteps[:rows], few)
            predicted = family.predict(self.model, latents, timesteps, told)
        gate = adapter.gate
        assert gate is not None
        errors = (predicted - target).square().flatten(1).mean(1)
        squared = (errors * inputs["weight"]).mean()
        fecl = torch.zeros_like(squared)
        if consistency == "start":
            # Another kernel's rounding in place of zero would be all that the loss sees, at a gradient of one over it.
            base = predicted[:rows].detach()
        if base is not None:
            fecl = inputs["ramp"] * adapter.fecl_loss(base, predicted[:rows], target[:rows])
        loss = squared + fecl
        scaler = accelerator.scaler
        share = loss / s.gradient_accumulation_steps
        (share if scaler is None else scaler.scale(share)).backward()
        if accelerator.num_processes == 1:
            self.flat.collect(accumulate=not first)
        elif last:
            # Until then each parameter's own gradient is what the processes will average.
            self.flat.collect()
        if last:
            self._update(inputs["rate"])
        return torch.cat([torch.stack([loss, squared, fecl]), gate.mean(0)]).detach()

    def _update(self, rate: Tensor) -> None:
        """Clip, and one step of the optimizer at the learning rate in ``rate``, a tensor of shape ()."""
        optimizer, scaler = self.optimizer, self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.flat.parameters(), self.settings.max_grad_norm)
        # The schedule keeps a number there: in a tensor it would have to be read back.
        (group,) = optimizer.param_groups
        number, group["lr"] = group["lr"], rate
        try:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        finally:
            group["lr"] = number

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, parameter by parameter, whatever this run's way of stepping."""
        return self.flat.split_state(self.optimizer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; how the optimizer computes stays this run's choice.

        Raises:
            ValueError: it is of other parameters.
        """
        joined = self.flat.join_state(state)
        (own,) = self.optimizer.param_groups
        joined["param_groups"][0].update({k: own[k] for k in ("fused", "foreach", "capturable")})
        self.optimizer.load_state_dict(joined)

    def release(self) -> None:
        """Let go of wrappers and graphs, at the end of a run."""
        self.model = self.base = self.family.denoiser
        self._captured = None
