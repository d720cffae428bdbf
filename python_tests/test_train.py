"""fera-ext train: what a step computes, and exact resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import helpers_train as parts
import numpy as np
import pytest
import torch
from helpers_train import ENTRY, arguments, command, losses, one_line_error, train
from PIL import Image
from safetensors.torch import load_file, save_file

from fera_ext.training import checkpointing
from fera_ext.training.errors import TrainError, UsageError

# What a step computes.


def test_training_learns(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / "red.png")
    options = {"max_train_steps": 30, "train_batch_size": 4}
    code, log = train(model, folder, tmp_path / "out", **options)
    # The same images, noise and timesteps, without learning.
    _, still = train(model, folder, tmp_path / "still", learning_rate=1e-30, **options)
    assert code == 0
    assert np.mean(losses(log)[-10:]) < 0.98 * np.mean(losses(still)[-10:])
    assert log[-1]["lr"] == 1e-2
    assert (tmp_path / "out" / "fera_adapter.safetensors").is_file()


def test_losses_are_the_formula(model: Path, images: Path, tmp_path: Path) -> None:
    """Step one by hand: experts start at zero, so the prediction is the base model's."""
    from diffusers import DDPMPipeline

    from fera_ext.training.data import NOISE, ImageFolder, Positions, collate, find_images, stream_seed

    _, log = train(model, images, tmp_path / "out", seed=7, max_train_steps=1)
    pipe = DDPMPipeline.from_pretrained(model)
    folder = ImageFolder(find_images(images), 16, 7)
    batch = collate([folder[p] for p in next(iter(Positions(2, 0)))])
    generator = torch.Generator().manual_seed(stream_seed(7, NOISE, 0, 0))
    noise = torch.randn(batch.pixels.shape, generator=generator)
    steps = torch.randint(0, 1000, (2,), generator=generator)
    noisy = pipe.scheduler.add_noise(batch.pixels, noise, steps)
    with torch.no_grad():
        error = (pipe.unet.eval()(noisy, steps).sample - noise).square().mean()
    assert log[0]["mse"] == pytest.approx(float(error), rel=1e-5)
    assert log[0]["loss"] == pytest.approx(log[0]["mse"] + log[0]["fecl"], rel=1e-6)


def test_fecl_is_ramped_and_can_be_off(model: Path, images: Path, tmp_path: Path) -> None:
    _, full = train(model, images, tmp_path / "a", fecl_warmup_steps=0, max_train_steps=1)
    _, ramped = train(model, images, tmp_path / "b", fecl_warmup_steps=9, max_train_steps=1)
    _, off = train(model, images, tmp_path / "c", fecl_weight=0.0, max_train_steps=2)
    assert full[0]["fecl"] > 0
    assert ramped[0]["fecl"] == pytest.approx(full[0]["fecl"] / 10, rel=1e-5)
    assert [line["fecl"] for line in off] == [0.0, 0.0]
    assert off[0]["mse"] == pytest.approx(full[0]["mse"], rel=1e-6)


def test_gradient_checkpointing_changes_nothing(
    sd_model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    calls = 0
    forward = BasicTransformerBlock.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", counted)
    options = {"instance_prompt": "a cat", "resolution": 32, "fecl_warmup_steps": 0}
    _, plain = train(sd_model, images, tmp_path / "a", **options)
    without, calls = calls, 0
    _, saving = train(sd_model, images, tmp_path / "b", gradient_checkpointing=True, **options)
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)
    # Blocks are computed again in the backward pass.
    assert calls > without > 0


def test_accumulation_waits_and_averages(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the optimizer gets; its first step would look the same for a sum.
    gradients: list[torch.Tensor] = []

    def record(parameters: list[torch.Tensor], limit: float) -> None:
        gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    options = {"train_batch_size": 1, "fecl_weight": 0.0}
    accumulated = {**options, "gradient_accumulation_steps": 4}
    _, split = train(model, images, tmp_path / "a", max_train_steps=3, **accumulated)
    assert len(split) == len(gradients) == 3
    mean = gradients[0]
    gradients.clear()
    _, again = train(model, images, tmp_path / "b", max_train_steps=3, **accumulated)
    assert losses(split) == losses(again)
    gradients.clear()
    # The same four images and draws, one a step, without learning.
    _, singles = train(model, images, tmp_path / "c", learning_rate=1e-30, max_train_steps=4, **options)
    assert split[0]["loss"] == pytest.approx(np.mean(losses(singles)), rel=1e-5)
    assert mean.norm() > 0
    torch.testing.assert_close(mean, torch.stack(gradients).mean(0), rtol=1e-4, atol=1e-6 * float(mean.abs().max()))


def test_bfloat16_trains_close_to_float32(model: Path, images: Path, tmp_path: Path) -> None:
    _, exact = train(model, images, tmp_path / "a")
    _, rounded = train(model, images, tmp_path / "b", mixed_precision="bf16")
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.03)


def test_workers_change_nothing(model: Path, images: Path, tmp_path: Path) -> None:
    _, inline = train(model, images, tmp_path / "a")
    _, worked = train(model, images, tmp_path / "b", dataloader_num_workers=2)
    assert losses(worked) == losses(inline)


@pytest.mark.parametrize("bands", ["rings", "author"])
def test_bands_are_used(bands: str, model: Path, images: Path, tmp_path: Path) -> None:
    train(model, images, tmp_path, bands=bands, num_bands=2, num_experts=2, max_train_steps=1)
    from safetensors import safe_open

    with safe_open(tmp_path / "fera_adapter.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert config["bands"] == {"name": bands, "K": 2}
    assert config["num_experts"] == 2


# Resuming.


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.3, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"gradient_accumulation_steps": 2, "train_batch_size": 1, "random_flip": True},
    ],
    ids=["dropout-cosine", "accumulation-flip"],
)
def test_resume_is_exact_mid_epoch(options: dict[str, Any], model: Path, images: Path, tmp_path: Path) -> None:
    options = {**options, "max_train_steps": 8, "seed": 3, "validation_steps": 2, "num_validation_images": 1}
    options["validation_inference_steps"] = 1
    _, whole = train(model, images, tmp_path / "whole", checkpointing_steps=3, **options)
    resumed_from = tmp_path / "whole" / "checkpoint-3"
    _, rest = train(model, images, tmp_path / "rest", resume_from_checkpoint=str(resumed_from), **options)
    assert [line["step"] for line in rest] == [4, 5, 6, 7, 8]
    assert rest == whole[3:]
    ends = [load_file(tmp_path / name / "fera_adapter.safetensors") for name in ("whole", "rest")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_resume_latest_cuts_the_log(model: Path, images: Path, tmp_path: Path) -> None:
    options = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "max_train_steps": 6}
    _, whole = train(model, images, tmp_path, **options)
    assert [p.name for p in checkpointing.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    (tmp_path / "checkpoint-6").rename(tmp_path / "gone")
    (tmp_path / ".checkpoint-9.tmp").mkdir()
    _, again = train(model, images, tmp_path, resume_from_checkpoint="latest", **options)
    assert again == whole
    assert not (tmp_path / ".checkpoint-9.tmp").exists()


def test_resume_latest_without_checkpoint_starts(model: Path, images: Path, tmp_path: Path) -> None:
    code, log = train(model, images, tmp_path, resume_from_checkpoint="latest", max_train_steps=1)
    assert (code, len(log)) == (0, 1)


def test_resume_checks_what_losses_depend_on(model: Path, images: Path, tmp_path: Path) -> None:
    train(model, images, tmp_path, checkpointing_steps=1, max_train_steps=1)
    with pytest.raises(UsageError, match="checkpoint of another run"):
        train(model, images, tmp_path)
    with pytest.raises(UsageError, match=r"rank=2 \(there 4\).*seed=5 \(there 0\)"):
        train(model, images, tmp_path, resume_from_checkpoint="latest", rank=2, seed=5)
    with pytest.raises(UsageError, match="max_train_steps must be more than the 1"):
        train(model, images, tmp_path, resume_from_checkpoint="checkpoint-1", max_train_steps=1)
    with pytest.raises(UsageError, match="resume_from_checkpoint must be"):
        train(model, images, tmp_path, resume_from_checkpoint="checkpoint-7")


def test_resume_checks_images_and_base(model: Path, tmp_path: Path) -> None:
    folder = parts.write_images(tmp_path / "images", 2)
    out = tmp_path / "out"
    train(model, folder, out, checkpointing_steps=1, max_train_steps=1)
    more = ("--resume_from_checkpoint", "latest", "--train_batch_size", "2", "--learning_rate", "0.01")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = next((other / "unet").glob("*.safetensors"))
    save_file({name: 1.5 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert "base_model='sha256:" in one_line_error(command(*arguments(other, folder, out, *more)), 2)
    # The same images elsewhere are the same images.
    folder.rename(tmp_path / "moved")
    parts.write_images(folder, 3)
    message = one_line_error(command(*arguments(model, folder, out, *more)), 2)
    assert "images='3 files sha256:" in message
    assert "(there '2 files sha256:" in message
    assert "base_model" not in message
    _, log = train(model, tmp_path / "moved", out, resume_from_checkpoint="latest", max_train_steps=2)
    assert [line["step"] for line in log] == [1, 2]


@pytest.mark.gpu
def test_fp16_resumes_exactly_on_a_gpu(model: Path, images: Path, tmp_path: Path) -> None:
    previous = torch.are_deterministic_algorithms_enabled()
    options = {"mixed_precision": "fp16", "max_train_steps": 6, "seed": 3}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _, whole = train(model, images, tmp_path / "whole", checkpointing_steps=3, **options)
        start = str(tmp_path / "whole" / "checkpoint-3")
        _, rest = train(model, images, tmp_path / "rest", resume_from_checkpoint=start, **options)
    finally:
        torch.use_deterministic_algorithms(previous)
    assert len(whole) == 6
    assert all(np.isfinite(losses(whole)))
    assert rest == whole[3:]
    ends = [load_file(tmp_path / name / "fera_adapter.safetensors") for name in ("whole", "rest")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("file", ["training_state.pt", "state.json", "fera_adapter.safetensors"])
def test_damaged_checkpoint(file: str, model: Path, images: Path, tmp_path: Path) -> None:
    train(model, images, tmp_path, checkpointing_steps=1, max_train_steps=1)
    (tmp_path / "checkpoint-1" / file).write_bytes(b"{")
    with pytest.raises(TrainError) as error:
        train(model, images, tmp_path, resume_from_checkpoint="latest")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_exits(number: signal.Signals, model: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = arguments(model, images, out, "--train_batch_size", "2", "--learning_rate", "0.01")
    line[line.index("--max_train_steps") + 1] = "100000"
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").is_file() or len(parts.read_log(out)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    log = parts.read_log(out)
    last = int(log[-1]["step"])
    assert f"stopped after step {last}" in stdout.replace("\n", " ")
    assert [p.name for p in checkpointing.checkpoints(out)] == [f"checkpoint-{last}"]
    # Going on from there gives what a run that was never stopped would have given.
    options = {"max_train_steps": last + 2, "learning_rate": 0.01}
    _, more = train(model, images, out, resume_from_checkpoint="latest", **options)
    _, whole = train(model, images, tmp_path / "whole", **options)
    assert losses(more) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.slow
def test_two_processes_resume_exactly(model: Path, images: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(f"{ENTRY}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]

    def distributed(output: Path, *more: str) -> list[dict[str, float]]:
        line = arguments(model, images, output, "--learning_rate", "0.01", "--checkpointing_steps", "2", *more)
        line[line.index("--max_train_steps") + 1] = "4"
        done = subprocess.run([*launch, *line], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return parts.read_log(output)

    whole = distributed(tmp_path / "whole")
    resumed = str(tmp_path / "whole" / "checkpoint-2")
    rest = distributed(tmp_path / "rest", "--resume_from_checkpoint", resumed)
    assert len(whole) == 4
    assert rest == whole[2:]
