"""Pipelines of random parts, saved as folders, and the training command as a function, for its tests."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import helpers_models as models
import numpy as np
import torch
from PIL import Image

ENTRY = "from fera_ext.training.command import train; import typer; typer.run(train)"
"""What a process of its own runs."""


def write_images(folder: Path, count: int = 5, size: int = 40) -> Path:
    """Noise of several sizes, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (size + 3 * i, size + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows the letters."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=7)


def clip(width: int, projection: int | None = None) -> Any:
    """A CLIP text encoder; with a projection if asked."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        projection_dim=projection or 32,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer() -> Any:
    """A T5 tokenizer that knows the letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=8)


def t5(width: int = 24) -> Any:
    """A T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(width)
    return T5EncoderModel(T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def vae(latent_channels: int = 4) -> Any:
    """A VAE of factor 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def ddpm(folder: Path) -> Path:
    """An unconditional pipeline on 16 x 16 RGB."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def sd(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Stable Diffusion."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, prediction_type=prediction_type)
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(24),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        unet=models.sd15().model.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    """Stable Diffusion XL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(32),
        text_encoder_2=clip(32, projection=32),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2"),
        unet=models.sdxl().model.eval(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """Stable Diffusion 3 without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    StableDiffusion3Pipeline(
        vae=vae(),
        text_encoder=clip(12, projection=16),
        text_encoder_2=clip(12, projection=16),
        text_encoder_3=None,
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=clip_tokenizer(folder / "tokenizer_2"),
        tokenizer_3=None,
        transformer=models.sd3().model.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def flux(folder: Path) -> Path:
    """FLUX.1."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    FluxPipeline(
        vae=vae(),
        text_encoder=clip(32),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(folder / "tokenizer"),
        tokenizer_2=t5_tokenizer(),
        transformer=models.flux().model.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    """PixArt-alpha."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline

    PixArtAlphaPipeline(
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=models.pixart().model,
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder


def dit(folder: Path) -> Path:
    """DiT."""
    from diffusers import DDIMScheduler, DiTPipeline

    DiTPipeline(models.dit().model, vae(), DDIMScheduler()).save_pretrained(folder)
    # The class names live in the index, as in published checkpoints.
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"class {i}" for i in range(3)}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def command(*arguments: str) -> Any:
    """The command as a user calls it; its result has exit_code, stdout and stderr."""
    import typer
    from typer.testing import CliRunner

    from fera_ext.training.command import CONTEXT
    from fera_ext.training.command import train as train_command

    app = typer.Typer()
    app.command(context_settings=CONTEXT)(train_command)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return CliRunner().invoke(app, arguments)


def arguments(model: Path | str, images: Path, output: Path, *more: str) -> list[str]:
    """The command's line for a very short run."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(images)),
        *("--output_dir", str(output), "--resolution", "16", "--max_train_steps", "2", *more),
    ]


def one_line_error(result: Any, code: int) -> str:
    """The message of a failed command, which must be one line and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("fera-ext train:")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1
    assert "Traceback" not in result.output
    return lines[0]


def train(model: Path | str, images: Path, output: Path, **options: Any) -> tuple[int, list[dict[str, float]]]:
    """Run the training in this process; its exit status and its log."""
    from accelerate.state import AcceleratorState
    from rich.console import Console

    from fera_ext.training.loop import run
    from fera_ext.training.settings import Settings

    AcceleratorState._reset_state(True)
    values: dict[str, Any] = {
        "resolution": 16,
        "train_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 0,
        "learning_rate": 1e-2,
        **options,
    }
    settings = Settings(str(model), images, output, **values)
    code = run(settings, Console(quiet=True))
    return code, read_log(output)


def read_log(output: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(log: list[dict[str, float]]) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in log]
