"""Every family trains, learns, and draws validation images with its real pipeline class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import helpers_train as parts
import pytest
import torch

from fera_ext.training.errors import TrainError, UsageError
from fera_ext.training.families import FAMILIES, load_family
from fera_ext.training.noising import Diffusion, FlowMatching, process_of

BUILDERS: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "ddpm": (parts.ddpm, None),
    "sd": (parts.sd, "a cat"),
    "sdxl": (parts.sdxl, "a cat"),
    "sd3": (parts.sd3, "a cat"),
    "flux": (parts.flux, "a cat"),
    "pixart": (parts.pixart, "a cat"),
    "dit": (parts.dit, "class 1"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_family_trains_and_draws(name: str, tmp_path: Path) -> None:
    build, prompt = BUILDERS[name]
    model = build(tmp_path / "model")
    images = parts.write_images(tmp_path / "images", 2)
    code, log = parts.train(
        model,
        images,
        tmp_path / "out",
        resolution=32,
        instance_prompt=prompt,
        validation_prompt=prompt,
        validation_steps=3,
        num_validation_images=2,
        validation_inference_steps=2,
        max_train_steps=3,
    )
    assert code == 0
    assert len(log) == 3
    assert all(line["fecl"] > 0 for line in log[1:])
    gates = [log[-1][f"gate_{m}"] for m in range(3)]
    assert sum(gates) == pytest.approx(1.0, abs=1e-5)
    assert len(list((tmp_path / "out" / "validation").glob("*.png"))) == 2
    family = load_family(str(model), torch.device("cpu"), torch.float32)
    from fera_ext import load_adapter

    adapter = load_adapter(family.denoiser, tmp_path / "out")
    assert any(bool(p.any()) for n, p in adapter.named_parameters() if n.endswith("lora_B"))


def test_sdxl_is_told_the_size_before_resizing(tmp_path: Path) -> None:
    from PIL import Image

    from fera_ext.training.data import ImageFolder, collate

    family = load_family(str(parts.sdxl(tmp_path / "model")), torch.device("cpu"), torch.float32)
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    batch = collate([ImageFolder([tmp_path / "a.png"], 32, 0, center_crop=True)[0]])
    told: list[torch.Tensor] = []
    family.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        told_all = family.condition(family.encode("a cat"), batch)
        family.predict(family.denoiser, torch.zeros(1, 4, 16, 16), torch.tensor([5]), told_all)
    # Original height and width, top and left of the crop, height and width asked for.
    assert told[0].tolist() == [[64.0, 96.0, 0.0, 8.0, 32.0, 32.0]]


def test_families_are_diffusers_classes() -> None:
    import diffusers

    assert all(hasattr(diffusers, name) for name in FAMILIES)


def test_unknown_class_names_the_known(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(TrainError, match=r"StableDiffusionPipeline.*KandinskyPipeline"):
        load_family(str(tmp_path), torch.device("cpu"), torch.float32)


def test_damaged_pipeline_is_one_line(tmp_path: Path) -> None:
    model = parts.ddpm(tmp_path / "model")
    next((model / "unet").glob("*.safetensors")).write_bytes(b"no")
    with pytest.raises(TrainError, match="could not be loaded") as error:
        load_family(str(model), torch.device("cpu"), torch.float32)
    assert "\n" not in str(error.value)


def test_dit_wants_a_class(tmp_path: Path) -> None:
    model = parts.dit(tmp_path / "model")
    family = load_family(str(model), torch.device("cpu"), torch.float32)
    assert int(family.encode("2")["label"]) == 2
    with pytest.raises(UsageError, match="class of the model"):
        family.encode("a cat")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_diffusion_targets(kind: str) -> None:
    process = Diffusion({"prediction_type": kind, "beta_schedule": "scaled_linear"}, snr_gamma=5.0)
    clean, noise = torch.randn(64, 3, 4, 4), torch.randn(64, 3, 4, 4)
    out = process(clean, noise, torch.Generator().manual_seed(0))
    a = process.scheduler.alphas_cumprod[out.timesteps].double()
    signal, spread = a.sqrt().view(-1, 1, 1, 1), (1 - a).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(out.latents.double(), signal * clean + spread * noise, rtol=1e-5, atol=1e-5)
    target = {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}[kind]
    torch.testing.assert_close(out.target.double(), target.double(), rtol=1e-5, atol=1e-5)
    snr = a / (1 - a)
    weight = {"epsilon": snr.clamp(max=5) / snr, "v_prediction": snr.clamp(max=5) / (snr + 1)}.get(
        kind, snr.clamp(max=5)
    )
    torch.testing.assert_close(out.weight.double(), weight, rtol=1e-5, atol=1e-6)


def test_flow_matching_target() -> None:
    process = FlowMatching({"shift": 3.0, "num_train_timesteps": 1000}, None)
    clean, noise = torch.randn(512, 2, 4, 4), torch.randn(512, 2, 4, 4)
    out = process(clean, noise, torch.Generator().manual_seed(0))
    s = (out.timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(out.latents, (1 - s) * clean + s * noise, rtol=1e-5, atol=1e-5)
    # Following the target from the noisy latent leads to the clean one.
    torch.testing.assert_close(out.latents - s * out.target, clean, rtol=1e-4, atol=1e-4)
    assert 0 < float(s.min()) < 0.5 < float(s.mean()) < float(s.max()) < 1
    with pytest.raises(UsageError, match="snr_gamma"):
        FlowMatching({}, 5.0)


def test_unknown_prediction_type() -> None:
    with pytest.raises(UsageError, match="prediction_type"):
        Diffusion({"prediction_type": "flow"}, None)


@pytest.mark.parametrize("name", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "ScoreSdeVeScheduler"])
def test_schedulers_of_other_processes_are_refused(name: str) -> None:
    import diffusers

    with pytest.raises(UsageError, match=f"DDPM's betas or flow matching, got {name}"):
        process_of(getattr(diffusers, name)(), None)
    with pytest.raises(UsageError, match="EulerDiscreteScheduler"):
        process_of(diffusers.EulerDiscreteScheduler(timestep_type="continuous"), None)
    for known in ("DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LMSDiscrete"):
        assert isinstance(process_of(getattr(diffusers, f"{known}Scheduler")(), None), Diffusion)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_the_pipelines(kind: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=kind)
    process = process_of(scheduler, None, patch=2)
    clean, noise = torch.zeros(64, 1, 64, 96), torch.ones(64, 1, 64, 96)
    out = process(clean, noise, torch.Generator().manual_seed(0))
    s = torch.sigmoid(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    expected = scheduler.time_shift(calculate_shift(32 * 48), 1.0, s)
    torch.testing.assert_close(out.timesteps / 1000, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.latents[:, 0, 0, 0], expected, rtol=1e-5, atol=1e-6)
