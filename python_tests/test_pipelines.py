"""Real pipelines from tiny random parts: guidance doubles the batch, and each half routes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import latents, randomise, sd15, sdxl
from torch import Tensor

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig

CONFIG = FeraConfig(bands=Bands.rings(3))
STEPS, GUIDANCE = 3, 4.0


def _tokenizer(folder: Path) -> Any:
    import json

    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=7)


def _text_encoder(width: int, projection: bool = False) -> Any:
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
        projection_dim=32,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


@pytest.fixture
def sd_pipe(tmp_path: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(24),
        tokenizer=_tokenizer(tmp_path / "tokenizer"),
        unet=sd15().model.eval(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def xl_pipe(tmp_path: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    unet = sdxl().model.eval()
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(32),
        text_encoder_2=_text_encoder(32, projection=True),
        tokenizer=_tokenizer(tmp_path / "tokenizer"),
        tokenizer_2=_tokenizer(tmp_path / "tokenizer_2"),
        unet=unet,
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def _by_hand(pipe: Any, adapter: FeraAdapter, z: Tensor, halves: list[dict[str, Any]]) -> Tensor:
    """One sample, guidance by two separate calls, every call with its own gate."""
    scheduler = _scheduler()
    scheduler.set_timesteps(STEPS)
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        off, on = (pipe.unet(scheduler.scale_model_input(z, t), t, **half).sample for half in halves)
        z = scheduler.step(off + GUIDANCE * (on - off), t, z).prev_sample
    return z


def _run(pipe: Any, z: Tensor, prompts: list[str], output: str = "latent") -> Any:
    return pipe(
        prompts,
        negative_prompt=["bad"] * len(prompts),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=32,
        width=32,
        latents=z.clone(),
        output_type=output,
    ).images


def _gates(pipe: Any, adapter: FeraAdapter) -> list[Tensor]:
    seen: list[Tensor] = []

    def remember(module: Any, args: Any, output: Any) -> None:
        assert adapter.gate is not None
        seen.append(adapter.gate)

    pipe.unet.register_forward_hook(remember)
    return seen


def test_stable_diffusion(sd_pipe: Any) -> None:
    z, prompts = latents(2, 4, 16, 16), ["a cat", "two dogs"]
    want = _run(sd_pipe, z, prompts)
    adapter = attach(sd_pipe.unet, CONFIG)
    randomise(adapter)
    seen = _gates(sd_pipe, adapter)
    on = _run(sd_pipe, z, prompts)
    assert [tuple(g.shape) for g in seen] == [(4, 3)] * STEPS
    for gate in seen:
        # Guidance feeds the same latents twice.
        assert torch.equal(gate[:2], gate[2:])
        assert float((gate[0] - gate[1]).abs().max()) > 0.02
    assert not torch.allclose(seen[0], seen[-1])
    assert float((on - want).abs().max()) > 1e-2
    for b, prompt in enumerate(prompts):
        text, negative = sd_pipe.encode_prompt(prompt, "cpu", 1, True, "bad")
        halves = [{"encoder_hidden_states": e} for e in (negative, text)]
        alone = _by_hand(sd_pipe, adapter, z[b : b + 1], halves)
        torch.testing.assert_close(on[b : b + 1], alone, rtol=1e-4, atol=1e-4)
    with adapter.disabled():
        assert torch.equal(_run(sd_pipe, z, prompts), want)
    assert len(_run(sd_pipe, z, prompts, "pil")) == 2
    adapter.detach()
    assert torch.equal(_run(sd_pipe, z, prompts), want)


def test_stable_diffusion_xl(xl_pipe: Any) -> None:
    z, prompts = latents(2, 4, 16, 16), ["a cat", "two dogs"]
    want = _run(xl_pipe, z, prompts)
    adapter = attach(xl_pipe.unet, CONFIG)
    randomise(adapter)
    seen = _gates(xl_pipe, adapter)
    on = _run(xl_pipe, z, prompts)
    assert [tuple(g.shape) for g in seen] == [(4, 3)] * STEPS
    assert float((on - want).abs().max()) > 1e-2
    ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])
    for b, prompt in enumerate(prompts):
        text, negative, pooled, negative_pooled = xl_pipe.encode_prompt(prompt, negative_prompt="bad")
        halves = [
            {"encoder_hidden_states": e, "added_cond_kwargs": {"text_embeds": p, "time_ids": ids}}
            for e, p in ((negative, negative_pooled), (text, pooled))
        ]
        alone = _by_hand(xl_pipe, adapter, z[b : b + 1], halves)
        torch.testing.assert_close(on[b : b + 1], alone, rtol=1e-4, atol=1e-4)
    with adapter.disabled():
        assert torch.equal(_run(xl_pipe, z, prompts), want)


def test_saved_adapter_in_another_pipeline(sd_pipe: Any, tmp_path: Path) -> None:
    from fera_ext.checkpoint import load_adapter

    z = latents(1, 4, 16, 16)
    adapter = attach(sd_pipe.unet, CONFIG)
    randomise(adapter)
    want = _run(sd_pipe, z, ["a cat"])
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    load_adapter(sd_pipe.unet, tmp_path / "adapter")
    assert torch.equal(_run(sd_pipe, z, ["a cat"]), want)
