"""The kinds of models that can be trained: one small class each, one line each in :data:`FAMILIES`.

A family knows how to encode a prompt and an image, how to call the denoiser, and how to draw
validation images; the noise, the losses and the loop are the same for all.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fera_ext.training.data import Batch, to_device
from fera_ext.training.errors import TrainError, UsageError, first_line
from fera_ext.training.settings import PIPELINES

Conditioning = dict[str, Tensor]
"""What a prompt becomes: tensors with a first axis of one."""


class Family:
    """A latent text-to-image pipeline.

    Args:
        pipe: the loaded diffusers pipeline, on the CPU.
        device: where to train.
        dtype: of the frozen denoiser and text encoders; the VAE is float32.
    """

    denoiser_name = "transformer"
    prompted = True
    packed = False
    """Whether the denoiser takes tokens that do not say the latent's height and width."""

    def __init__(self, pipe: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.pipe = pipe
        self.device = device
        self.dtype = dtype
        self.denoiser: Any = getattr(pipe, self.denoiser_name)
        self.vae: Any = getattr(pipe, "vae", None)
        self.denoiser.to(device, dtype)
        if self.vae is not None:
            # float16 overflows in some VAEs, and encoding is a small part of a step.
            self.vae.to(device, torch.float32).requires_grad_(False).eval()
        for encoder in self.text_encoders():
            encoder.to(dtype).requires_grad_(False).eval()

    def text_encoders(self) -> list[nn.Module]:
        """The pipeline's text encoders."""
        found = [getattr(self.pipe, name, None) for name in self.pipe.components if "text_encoder" in name]
        return [encoder for encoder in found if encoder is not None]

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def vae_shift(self) -> float:
        """The mean of the VAE's latents, which newer VAEs name."""
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    @property
    def multiple(self) -> int:
        """What the resolution must be a multiple of, in pixels."""
        return self.vae_factor * int(getattr(self.denoiser.config, "patch_size", None) or 1)

    def fingerprint(self) -> str:
        """Of the denoiser: its configuration and the first values of every tensor; before an adapter is attached."""
        config = {k: v for k, v in dict(self.denoiser.config).items() if not k.startswith("_")}
        parts = {type(self.denoiser).__name__: config}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        few = [p.detach().flatten()[:16].float() for p in self.denoiser.parameters()]
        digest.update(torch.cat(few).cpu().numpy().tobytes())
        return f"sha256:{digest.hexdigest()[:16]}"

    @property
    def channels(self) -> int:
        """Colour channels of the images: 3, or 1 for grey."""
        return 3

    def check_resolution(self, resolution: int) -> None:
        """Whether the model takes square images of ``resolution`` pixels.

        Raises:
            UsageError: it does not.
        """
        from fera_ext.bands.definition import MAX_SIDE

        if resolution % self.multiple:
            raise UsageError(
                f"resolution must be a multiple of {self.multiple} for {type(self.pipe).__name__}, got {resolution}"
            )
        if resolution // self.vae_factor > MAX_SIDE:
            raise UsageError(f"resolution must be at most {MAX_SIDE * self.vae_factor}, got {resolution}")

    @torch.no_grad()
    def encode(self, prompt: str) -> Conditioning:
        """A prompt's conditioning, on the device."""
        for encoder in self.text_encoders():
            encoder.to(self.device)
        return {k: v.to(self.device) for k, v in self.encode_text(prompt).items() if v is not None}

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        """The pipeline's own encoding of a prompt."""
        raise NotImplementedError

    def release_text_encoders(self) -> None:
        """Move the text encoders off the device, once the prompt is encoded."""
        for encoder in self.text_encoders():
            encoder.to("cpu")

    @torch.no_grad()
    def to_latents(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pixels (B, 3, S, S) in [-1, 1] to latents (B, C, H, W), float32, sampled from the posterior."""
        pixels = to_device(pixels, self.device).to(torch.float32)
        if self.vae is None:
            return pixels
        latents = self.vae.encode(pixels).latent_dist.sample(generator=generator)
        return (latents - self.vae_shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def to_images(self, latents: Tensor) -> list[Any]:
        """The inverse of :meth:`to_latents`, as PIL images."""
        assert self.vae is not None
        decoded = self.vae.decode(latents.float() / self.vae.config.scaling_factor + self.vae_shift).sample
        return self.pipe.image_processor.postprocess(decoded, output_type="pil")

    def condition(self, prompt: Conditioning, batch: Batch) -> Conditioning:
        """All that the denoiser is told besides latents and times, on the device.

        Args:
            prompt: the prompt's conditioning.
            batch: where the images come from: sizes and crops.
        """
        return {**prompt, **{k: to_device(v, self.device) for k, v in self.describe(batch).items()}}

    def describe(self, batch: Batch) -> Conditioning:
        """What the denoiser is told about each image, (B, ...) on the CPU."""
        return {}

    def predict(self, model: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The model's prediction (B, C, H, W) in float32; a learned variance is dropped.

        It reads these tensors alone, and neither waits for the device nor copies to it: a CUDA graph can hold it.

        Args:
            model: the denoiser, perhaps wrapped.
            latents: (B, C, H, W) noisy latents.
            timesteps: (B,).
            conditioning: what :meth:`condition` gives; a first axis of one serves the whole batch.
        """
        count = len(latents)
        expanded = {k: v.expand(count, *v.shape[1:]) for k, v in conditioning.items()}
        out = self.call(model, latents.to(self.dtype), timesteps, expanded)
        return out[:, : latents.shape[1]].float()

    def call(self, model: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's call, with its own argument names."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, prompt: str | None, count: int, size: int, steps: int, seeds: list[int]) -> list[Any]:
        """``count`` images from the current model, as PIL images; each has a seed of its own."""
        for encoder in self.text_encoders():
            encoder.to(self.device)
        # The initial noise is drawn on the CPU, so that it is the same on every device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[:count]]
        self.pipe.set_progress_bar_config(disable=True)
        return self.draw(prompt or "", generators, size, steps)

    def draw(self, prompt: str, generators: list[torch.Generator], size: int, steps: int) -> list[Any]:
        """The pipeline's call; the VAE decodes in float32, apart from it."""
        latents = self.pipe(
            prompt=[prompt] * len(generators),
            height=size,
            width=size,
            num_inference_steps=steps,
            generator=generators,
            output_type="latent",
            **self.draw_options,
        ).images
        return self.to_images(latents)

    draw_options: dict[str, Any] = {}  # noqa: RUF012 (read only)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    denoiser_name = "unet"

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        return {"text": self.pipe.encode_prompt(prompt, self.device, 1, False)[0]}

    def call(self, model, latents, timesteps, conditioning):  # type: ignore[no-untyped-def]
        return model(latents, timesteps, encoder_hidden_states=conditioning["text"]).sample


class StableDiffusionXL(Family):
    """Stable Diffusion XL: also told each image's size and crop."""

    denoiser_name = "unet"

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def describe(self, batch: Batch) -> Conditioning:
        target = torch.full_like(batch.sizes, batch.pixels.shape[-1])
        return {"time_ids": torch.cat([batch.originals, batch.corners, target], dim=1)}

    def call(self, model, latents, timesteps, conditioning):  # type: ignore[no-untyped-def]
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"].to(self.dtype)}
        return model(latents, timesteps, encoder_hidden_states=conditioning["text"], added_cond_kwargs=added).sample


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def call(self, model, latents, timesteps, conditioning):  # type: ignore[no-untyped-def]
        return model(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["pooled"],
        ).sample


class Flux(Family):
    """FLUX.1: tokens of 2 x 2 latent pixels."""

    packed = True
    GUIDANCE = 3.5
    """What a guidance-distilled model is told while training."""

    @property
    def multiple(self) -> int:
        return self.vae_factor * 2

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        text, pooled, _ = self.pipe.encode_prompt(prompt, None, device=self.device)
        return {"text": text, "pooled": pooled}

    def call(self, model, latents, timesteps, conditioning):  # type: ignore[no-untyped-def]
        count, channels, height, width = latents.shape
        patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2)
        tokens = patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * 4)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((count,), self.GUIDANCE, device=self.device)
        out = model(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=conditioning["text"],
            txt_ids=torch.zeros(conditioning["text"].shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self._image_ids(height // 2, width // 2),
        ).sample
        out = out.reshape(count, height // 2, width // 2, channels, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)

    def _image_ids(self, height: int, width: int) -> Tensor:
        """(T, 3) positions; kept for each size, because CUDA graphs read them and do not keep them."""
        known: dict[tuple[int, int], Tensor] = self.__dict__.setdefault("_ids", {})
        if (height, width) not in known:
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            table = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
            known[height, width] = table.to(self.device, self.dtype)
        return known[height, width]

    def to_images(self, latents: Tensor) -> list[Any]:
        count, tokens, channels = latents.shape
        side = round(tokens**0.5)
        grid = latents.reshape(count, side, side, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return super().to_images(grid.reshape(count, channels // 4, 2 * side, 2 * side))


class PixArt(Family):
    """PixArt-alpha and PixArt-sigma."""

    draw_options = {"clean_caption": False, "use_resolution_binning": False}  # noqa: RUF012 (read only)

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        text, mask, _, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device=self.device)
        return {"text": text, "mask": mask}

    def describe(self, batch: Batch) -> Conditioning:
        return {"sizes": batch.sizes}

    def call(self, model, latents, timesteps, conditioning):  # type: ignore[no-untyped-def]
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if getattr(self.denoiser, "use_additional_conditions", False):
            sizes = conditioning["sizes"].to(self.dtype)
            added = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
        return model(
            latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["text"],
            encoder_attention_mask=conditioning["mask"],
            added_cond_kwargs=added,
        ).sample


class DiT(Family):
    """Class-conditional DiT: the prompt is a class, by number or by name."""

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        labels = getattr(self.pipe, "labels", None) or {}
        if prompt in labels:
            label = int(labels[prompt])
        elif prompt.isdecimal() and int(prompt) < self.denoiser.config.num_embeds_ada_norm:
            label = int(prompt)
        else:
            raise UsageError(f"instance_prompt must be a class of the model by number or name, got {prompt!r}")
        return {"label": torch.tensor([label])}

    def call(self, model, latents, timesteps, conditioning):  # type: ignore[no-untyped-def]
        return model(latents, timestep=timesteps, class_labels=conditioning["label"]).sample

    def draw(self, prompt: str, generators: list[torch.Generator], size: int, steps: int) -> list[Any]:
        label = int(self.encode(prompt)["label"])
        # This pipeline decodes by itself, so the VAE must not be of another dtype.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            labels = [label] * len(generators)
            return self.pipe(labels, generator=generators, num_inference_steps=steps).images


class Unconditional(Family):
    """A UNet2DModel on pixels: DDPM and DDIM pipelines."""

    denoiser_name = "unet"
    prompted = False

    @property
    def multiple(self) -> int:
        return 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        return int(self.denoiser.config.in_channels)

    def encode_text(self, prompt: str) -> dict[str, Tensor | None]:
        return {}

    def call(self, model, latents, timesteps, conditioning):  # type: ignore[no-untyped-def]
        return model(latents, timesteps).sample

    def draw(self, prompt: str, generators: list[torch.Generator], size: int, steps: int) -> list[Any]:
        return self.pipe(batch_size=len(generators), generator=generators, num_inference_steps=steps).images


_CLASSES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "DiTPipeline": DiT,
    "DDPMPipeline": Unconditional,
    "DDIMPipeline": Unconditional,
}
FAMILIES: dict[str, type[Family]] = {name: _CLASSES[name] for name in PIPELINES}
"""Pipeline class, as ``model_index.json`` names it, to family."""


def load_family(
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    variant: str | None = None,
) -> Family:
    """Load a pipeline from a folder or the hub.

    Raises:
        TrainError: there is no such model, it is of no known family, or it does not load.
    """
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        config = DiffusionPipeline.load_config(path, revision=revision)
    except Exception as error:  # the hub client's errors have no common class
        raise TrainError(
            "pretrained_model_name_or_path must be a diffusers pipeline's folder or hub name, "
            f"got {path} ({first_line(error, 160)})"
        ) from error
    name = str(config.get("_class_name"))
    if name not in FAMILIES:
        raise TrainError(
            f"pretrained_model_name_or_path must be one of {', '.join(FAMILIES)}, got {path} of class {name}"
        )
    options: dict[str, Any] = {"revision": revision, "variant": variant, "torch_dtype": dtype}
    if "safety_checker" in config:
        options["requires_safety_checker"] = False
    # A part that a pipeline was saved without is optional in some classes only when it is passed as None.
    absent = {"safety_checker"} | {k for k, v in config.items() if v in ([None, None], (None, None))}
    options.update({part: None for part in absent if part in config})
    try:
        with warnings.catch_warnings():
            # The newest diffusers calls this argument dtype; older ones know torch_dtype only.
            warnings.simplefilter("ignore", FutureWarning)
            # By its own class: diffusers swaps some pipelines for others of the same components.
            pipe = getattr(diffusers, name).from_pretrained(path, **options)
    except Exception as error:
        raise TrainError(f"{path} could not be loaded as a {name}: {first_line(error)}") from error
    return FAMILIES[name](pipe, device, dtype)
