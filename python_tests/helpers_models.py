"""Small random models of the real classes, each with a batch of inputs, for the adapter's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fera_ext.adapter import FeraAdapter


@dataclass
class Case:
    """A model and its inputs.

    Attributes:
        model: the denoiser.
        inputs: keyword arguments of one forward; tensors with the batch first where ``batched`` says so.
        batched: the inputs that have a batch axis.
        latent: the latent (B, ..., H, W) that the gate must come from.
    """

    model: nn.Module
    inputs: dict[str, Any]
    batched: tuple[str, ...]
    latent: Tensor

    def run(self, **changes: Any) -> Tensor:
        """The model's output tensor."""
        output = self.model(**{**self.inputs, **changes})
        if isinstance(output, Tensor):
            return output
        return output[0] if isinstance(output, tuple) else output.sample

    def run_one_by_one(self) -> Tensor:
        """The same outputs, one sample a call."""
        return torch.cat(
            [self.run(**{k: one_sample(self.inputs[k], b) for k in self.batched}) for b in range(self.latent.shape[0])]
        )


def one_sample(value: Any, b: int) -> Any:
    """Row ``b`` of a tensor, or of every tensor in a dict."""
    if isinstance(value, dict):
        return {k: one_sample(v, b) for k, v in value.items()}
    return value if value is None else value[b : b + 1]


def randomise(adapter: FeraAdapter, seed: int = 1, spread: float = 8.0) -> None:
    """Non-zero experts, and a router whose gates differ from sample to sample."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif name == "router.w2":
                parameter.mul_(spread)


def latents(*shape: int, seed: int = 0) -> Tensor:
    """White noise for even samples, smooth noise for odd ones: their gates differ."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*shape, generator=generator)
    flat = z.reshape(shape[0], -1, *shape[-2:])
    flat[1::2] = nn.functional.avg_pool2d(flat[1::2], 5, 1, 2) * 3
    return flat.reshape(shape)


def _sd15(batch: int, channels: int) -> Case:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    z = latents(batch, channels, 16, 16)
    inputs = {
        "sample": z,
        "timestep": torch.arange(batch) * 100 + 10,
        "encoder_hidden_states": torch.randn(batch, 7, 24),
    }
    # What is beyond four channels is not the noisy latent.
    return Case(model, inputs, tuple(inputs), z[:, :4])


def sd15(batch: int = 2) -> Case:
    return _sd15(batch, 4)


def sdxl(batch: int = 2) -> Case:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
    )
    z = latents(batch, 4, 16, 16)
    inputs = {
        "sample": z,
        "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(batch, 7, 64),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 32),
            "time_ids": torch.rand(batch, 6),
        },
    }
    return Case(model, inputs, ("sample", "encoder_hidden_states", "added_cond_kwargs"), z)


def unet2d(batch: int = 2) -> Case:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    z = latents(batch, 4, 16, 16)
    return Case(model, {"sample": z, "timestep": torch.arange(batch) + 5}, ("sample", "timestep"), z)


def svd(batch: int = 2) -> Case:
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 4),
        cross_attention_dim=24,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=3,
    )
    z = latents(batch, 3, 8, 8, 8)
    inputs = {
        "sample": z,
        "timestep": torch.arange(batch) * 50 + 10,
        "encoder_hidden_states": torch.randn(batch, 1, 24),
        "added_time_ids": torch.rand(batch, 3),
    }
    # The first frame's channels come after the noisy ones.
    return Case(model, inputs, tuple(inputs), z[:, :, :4])


def inpainting(batch: int = 2) -> Case:
    """The noisy latent, a mask and a masked image's latent, as the channels of one tensor."""
    return _sd15(batch, 9)


def sd3(batch: int = 2) -> Case:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    z = latents(batch, 4, 16, 16)
    inputs = {
        "hidden_states": z,
        "encoder_hidden_states": torch.randn(batch, 7, 24),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.arange(batch) * 50 + 10,
    }
    return Case(model, inputs, tuple(inputs), z)


def pack(z: Tensor) -> Tensor:
    """(B, C, H, W) to FLUX's tokens (B, HW/4, 4C), written out patch by patch."""
    rows = []
    for i in range(0, z.shape[2], 2):
        for j in range(0, z.shape[3], 2):
            rows.append(z[:, :, i : i + 2, j : j + 2].flatten(1))
    return torch.stack(rows, 1)


def image_ids(height: int, width: int, first: int = 0) -> Tensor:
    """FLUX's position ids (H/2 * W/2, 3)."""
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[..., 0] = first
    ids[..., 1] += torch.arange(height // 2)[:, None]
    ids[..., 2] += torch.arange(width // 2)[None]
    return ids.reshape(-1, 3)


def flux(batch: int = 2) -> Case:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    z = latents(batch, 4, 12, 20)
    inputs = {
        "hidden_states": pack(z),
        "encoder_hidden_states": torch.randn(batch, 7, 24),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.arange(batch) / 10 + 0.1,
        "img_ids": image_ids(12, 20),
        "txt_ids": torch.zeros(7, 3),
    }
    batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    return Case(model, inputs, batched, z)


def dit(batch: int = 2) -> Case:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=8,
        attention_bias=True,
        sample_size=16,
        num_embeds_ada_norm=1000,
    )
    z = latents(batch, 4, 16, 16)
    inputs = {
        "hidden_states": z,
        "timestep": torch.arange(batch) + 5,
        "class_labels": torch.arange(batch) % 3,
    }
    # The class embedding drops labels at random while training.
    return Case(model.eval(), inputs, tuple(inputs), z)


def pixart(batch: int = 2) -> Case:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=8,
        sample_size=16,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
    )
    z = latents(batch, 4, 16, 16)
    inputs = {
        "hidden_states": z,
        "encoder_hidden_states": torch.randn(batch, 7, 24),
        "timestep": torch.arange(batch) * 50 + 10,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Case(model.eval(), inputs, ("hidden_states", "encoder_hidden_states", "timestep"), z)


class Block(nn.Module):
    """Tokens in, tokens out, with the target names of an attention block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Plain(nn.Module):
    """A denoiser of one's own: the latent first; calls ``torch.utils.checkpoint`` itself if told so.

    Attributes:
        reentrant: None for no checkpointing, else the mode.
    """

    def __init__(self, channels: int = 4, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.inp = nn.Conv2d(channels, width, 1)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.out = nn.Conv2d(width, channels, 1)
        self.reentrant: bool | None = None

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        x = self.inp(z)
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.out(x.transpose(1, 2).reshape(shape))


def plain(batch: int = 2) -> Case:
    torch.manual_seed(0)
    z = latents(batch, 4, 8, 12)
    return Case(Plain(), {"z": z}, ("z",), z)


CASES: dict[str, Callable[..., Case]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "unet2d": unet2d,
    "inpainting": inpainting,
    "svd": svd,
    "sd3": sd3,
    "flux": flux,
    "dit": dit,
    "pixart": pixart,
    "plain": plain,
}
