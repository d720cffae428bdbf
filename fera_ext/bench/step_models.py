"""The denoisers of `fera-ext bench step`: diffusers' classes with the published configurations, random weights.

The configurations are written out, so nothing is downloaded. Each model has a small twin, ``tiny-sd15`` and the like,
for a CPU and for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fera_ext.architectures import LatentSize, packed_tokens

SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,  # of 19
    "num_single_layers": 4,  # of 38
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SVD: dict[str, Any] = {
    "sample_size": 96,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": (*("CrossAttnDownBlockSpatioTemporal",) * 3, "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", *("CrossAttnUpBlockSpatioTemporal",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "num_attention_heads": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "num_frames": 14,
}
TINY: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    "sdxl": {
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 64,
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "flux": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    },
    "svd": {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "num_attention_heads": (2, 4),
        "cross_attention_dim": 24,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "num_frames": 3,
    },
}
"""What differs from the published configuration."""

CONFIGS: dict[str, dict[str, Any]] = {"sdxl": SDXL, "sd15": SD15, "flux": FLUX, "svd": SVD}
CONFIGS |= {f"tiny-{name}": CONFIGS[name] | changes for name, changes in TINY.items()}

CLASSES = {
    "sd15": "UNet2DConditionModel",
    "sdxl": "UNet2DConditionModel",
    "flux": "FluxTransformer2DModel",
    "svd": "UNetSpatioTemporalConditionModel",
}
MODELS = tuple(name for name in CONFIGS if not name.startswith("tiny-"))
TINY_MODELS = tuple(f"tiny-{name}" for name in MODELS)

SIZES: dict[str, tuple[tuple[int, int], int]] = {
    "sd15": ((64, 64), 77),
    "sdxl": ((128, 128), 77),
    "flux": ((128, 128), 512),
    "svd": ((72, 128), 1),
    "tiny-sd15": ((16, 16), 7),
    "tiny-sdxl": ((16, 16), 7),
    "tiny-flux": ((12, 20), 7),
    "tiny-svd": ((8, 16), 1),
}
"""(height, width) of the latent in latent pixels, and text tokens."""


def family(name: str) -> str:
    """``sdxl`` of ``tiny-sdxl``."""
    return name.removeprefix("tiny-")


def build(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The denoiser with seeded random weights, made on the device in its dtype; eval mode, nothing asks for gradients.

    Matrices and filters are normal with variance 1 / fan-in, norms are 1 and biases 0, so outputs are of order 1.
    """
    import diffusers

    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, CLASSES[family(name)])(**CONFIGS[name])
    nn.Module.to(model, dtype=dtype)  # not diffusers' own, which warns
    model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = math.prod(parameter.shape[1:])
            parameter.data.normal_(0.0, 1.0 / math.sqrt(fan_in), generator=generator)
        else:
            parameter.data.fill_(1.0 if path.endswith("weight") else 0.0)
    for buffer in model.buffers():
        buffer.zero_()
    return model


Denoise = Callable[..., Any]
"""The model, or the model compiled: called with keyword arguments and ``return_dict=False``."""


@dataclass(frozen=True)
class Batch:
    """One training batch of a model, on the device.

    Attributes:
        model: the model's name.
        samples: B.
        inputs: keyword arguments of one forward.
        latent_name: which of them is the noisy latent.
        target: what the prediction is compared with, of its shape, float32.
        latent_size: (height, width) of the latent in latent pixels.
    """

    model: str
    samples: int
    inputs: Mapping[str, Any]
    latent_name: str
    target: Tensor
    latent_size: tuple[int, int]

    @property
    def latent(self) -> Tensor:
        """The noisy latent as the model takes it."""
        latent: Tensor = self.inputs[self.latent_name]
        return latent

    def predict(self, denoise: Denoise, latent: Tensor | None = None) -> Tensor:
        """The prediction for the batch's latent or another of its shape."""
        inputs = self.inputs if latent is None else {**self.inputs, self.latent_name: latent}
        prediction: Tensor = denoise(**inputs, return_dict=False)[0]
        return prediction

    def as_latent(self, values: Tensor) -> Tensor:
        """A prediction as (B, ..., H, W): FLUX's tokens (B, T, 4C) unpacked, others as they are."""
        if family(self.model) != "flux":
            return values
        size = LatentSize()
        size.given = self.latent_size
        return packed_tokens((values,), {}, size)


def draw_batch(name: str, samples: int, device: torch.device, dtype: torch.dtype) -> Batch:
    """A batch of seeded random numbers.

    Latents (B, 4, H, W) of SD1.5 and SDXL, (B, HW/4, 64) of FLUX, (B, 14, 8, H, W) of SVD (the noisy latent, then the
    first frame's); text (B, tokens, width); timesteps and position ids on the device, so that nothing synchronises.
    """
    config, kind = CONFIGS[name], family(name)
    (height, width), tokens = SIZES[name]
    generator = torch.Generator(device).manual_seed(samples)

    def drawn(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(to)

    text_width = config["joint_attention_dim"] if kind == "flux" else config["cross_attention_dim"]
    inputs: dict[str, Any] = {"encoder_hidden_states": drawn(samples, tokens, text_width)}
    steps = torch.linspace(10, 900, samples + 1, device=device)[:samples]
    latent_name = "sample"
    if kind == "flux":
        latent_name = "hidden_states"
        shape: Sequence[int] = (samples, height * width // 4, config["in_channels"])
        target_shape = shape
        inputs |= {
            "timestep": (steps / 1000).to(dtype),
            "guidance": torch.full((samples,), 3.5, device=device),
            "pooled_projections": drawn(samples, config["pooled_projection_dim"]),
            "img_ids": _image_ids(height // 2, width // 2, device).to(dtype),
            "txt_ids": torch.zeros(tokens, 3, device=device, dtype=dtype),
        }
    else:
        frames = (config["num_frames"],) if kind == "svd" else ()
        shape = (samples, *frames, config["in_channels"], height, width)
        target_shape = (samples, *frames, config["out_channels"], height, width)
        inputs["timestep"] = steps.long()
    if kind == "svd":
        inputs["added_time_ids"] = torch.tensor([[6.0, 127.0, 0.02]], device=device, dtype=dtype).repeat(samples, 1)
    if kind == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]], device=device, dtype=dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": drawn(samples, pooled), "time_ids": sizes.repeat(samples, 1)}
    inputs[latent_name] = drawn(*shape)
    return Batch(name, samples, inputs, latent_name, drawn(*target_shape, to=torch.float32), (height, width))


def _image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """FLUX's position ids (rows · columns, 3): 0, row, column."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)
