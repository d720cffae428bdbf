"""fera-ext train: what a step computes, exact resume, and every way to fail with one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import helpers_train as parts
import numpy as np
import pytest
import torch
import typer
from helpers_train import losses, train
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fera_ext.training import checkpointing
from fera_ext.training.command import CONTEXT
from fera_ext.training.command import train as train_command
from fera_ext.training.errors import TrainError, UsageError
from fera_ext.training.settings import Settings

ENTRY = "from fera_ext.training.command import train; import typer; typer.run(train)"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="session")
def sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.write_images(tmp_path_factory.mktemp("images"), 5)


def command(*arguments: str) -> Any:
    """The command as a user calls it; its result has exit_code, stdout and stderr."""
    app = typer.Typer()
    app.command(context_settings=CONTEXT)(train_command)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return CliRunner().invoke(app, arguments)


def arguments(model: Path | str, images: Path, output: Path, *more: str) -> list[str]:
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


def test_gradient_checkpointing_changes_nothing(sd_model: Path, images: Path, tmp_path: Path) -> None:
    options = {"instance_prompt": "a cat", "resolution": 32, "fecl_warmup_steps": 0}
    _, plain = train(sd_model, images, tmp_path / "a", **options)
    _, saving = train(sd_model, images, tmp_path / "b", gradient_checkpointing=True, **options)
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)


def test_accumulation_waits_and_averages(model: Path, images: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 3, "fecl_weight": 0.0}
    _, split = train(model, images, tmp_path / "a", train_batch_size=1, gradient_accumulation_steps=4, **options)
    _, again = train(model, images, tmp_path / "b", train_batch_size=1, gradient_accumulation_steps=4, **options)
    assert len(split) == 3
    assert losses(split) == losses(again)
    # The first figure is the mean over the four single images, before any update.
    _, singles = train(
        model,
        images,
        tmp_path / "c",
        train_batch_size=1,
        learning_rate=1e-30,
        max_train_steps=4,
        fecl_weight=0.0,
    )
    assert split[0]["loss"] == pytest.approx(np.mean(losses(singles)), rel=1e-5)


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


# Images.


def test_corrupt_image_is_skipped_by_name(model: Path, tmp_path: Path) -> None:
    folder = parts.write_images(tmp_path / "images", 3)
    good = (folder / "0.png").read_bytes()
    (folder / "bad.png").write_bytes(good[: len(good) // 2])
    (folder / "worse.jpg").write_bytes(b"not an image")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code, log = train(model, folder, tmp_path / "out", max_train_steps=6)
    messages = [str(w.message) for w in caught if "corrupt image skipped" in str(w.message)]
    assert code == 0
    assert len(log) == 6
    assert sorted("bad.png" in m for m in messages) == [False, True]
    assert sum("worse.jpg" in m for m in messages) == 1


def test_all_images_corrupt(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"x")
    message = one_line_error(command(*arguments(model, folder, tmp_path / "out")), 1)
    assert "readable image" in message


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    from fera_ext.training.data import ImageFolder

    file = tmp_path / ("a.tif" if mode in ("I;16", "CMYK") else "a.png")
    Image.new(mode, (20, 30)).save(file)
    sample = ImageFolder([file], 16, 0)[0]
    assert sample["pixels"].shape == (3, 16, 16)
    assert sample["size"] == (24, 16)
    assert sample["pixels"].abs().max() <= 1
    assert ImageFolder([file], 16, 0, channels=1)[0]["pixels"].shape == (1, 16, 16)


def test_order_visits_each_image_once_an_epoch(images: Path) -> None:
    from fera_ext.training.data import ImageFolder, find_images

    folder = ImageFolder(find_images(images), 16, 0)
    epochs = [[folder.file_index(5 * e + i) for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    centre = ImageFolder(find_images(images), 16, 0, center_crop=True)
    assert torch.equal(centre[0]["pixels"], centre[0]["pixels"])


def test_processes_share_the_stream_without_overlap() -> None:
    from itertools import islice

    from fera_ext.training.data import Positions

    seen = [p for rank in range(2) for batch in islice(Positions(3, 0, rank, 2), 4) for p in batch]
    assert sorted(seen) == list(range(24))
    assert next(iter(Positions(3, 2, 1, 2))) == [15, 16, 17]


# Errors a user can act on.


def test_command_trains(model: Path, images: Path, tmp_path: Path) -> None:
    more = ("--checkpointing-steps", "1", "--report-to", "tensorboard")
    line = arguments(model, images, tmp_path / "out", *more)
    result = command(*line)
    assert result.exit_code == 0, result.output
    assert "adapter saved" in result.stdout
    assert list((tmp_path / "out" / "logs").rglob("events*"))


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--resolution", "15", "resolution must be a multiple of 2"),
        ("--resolution", "0", "resolution must be at least 1"),
        ("--resolution", "1024", "resolution must be at most 512"),
        ("--rank", "0", "rank must be"),
        ("--bands", "wavelets", "bands must be one of dog, rings, author"),
        ("--num_bands", "99", "K must be"),
        ("--lr_scheduler", "fast", "lr_scheduler must be one of"),
        ("--learning_rate", "0", "learning_rate must be positive"),
        ("--train_batch_size", "0", "train_batch_size must be at least 1"),
        ("--snr_gamma", "-1", "snr_gamma must be positive"),
        ("--checkpoints_total_limit", "0", "checkpoints_total_limit must be at least 1"),
        ("--mixed_precision", "fp8", "mixed_precision must be one of"),
        ("--resume_from_checkpoint", "nowhere", "resume_from_checkpoint must be"),
    ],
)
def test_wrong_argument(flag: str, value: str, words: str, model: Path, images: Path, tmp_path: Path) -> None:
    assert words in one_line_error(command(*arguments(model, images, tmp_path / "out", flag, value)), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine with a GPU")
def test_fp16_needs_a_gpu(model: Path, images: Path, tmp_path: Path) -> None:
    line = arguments(model, images, tmp_path, "--mixed_precision", "fp16")
    assert "without a GPU" in one_line_error(command(*line), 2)


def test_empty_and_missing_folder(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "at least one image" in one_line_error(command(*arguments(model, empty, tmp_path / "o")), 2)
    missing = tmp_path / "missing"
    assert "must be a folder" in one_line_error(command(*arguments(model, missing, tmp_path / "o")), 2)


def test_unknown_model(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nothing"), "nobody/no-such-model", "bad name!"):
        message = one_line_error(command(*arguments(name, images, tmp_path / "out")), 1)
        assert name in message


def test_prompt_is_required(sd_model: Path, images: Path, tmp_path: Path) -> None:
    message = one_line_error(command(*arguments(sd_model, images, tmp_path / "out")), 2)
    assert "instance_prompt must be given" in message


def test_no_matching_layer(model: Path, images: Path, tmp_path: Path) -> None:
    line = arguments(model, images, tmp_path / "out", "--target_modules", "to_query")
    assert "to_query" in one_line_error(command(*line), 1)


def test_full_disk(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(model, images, tmp_path, checkpointing_steps=1, max_train_steps=1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = arguments(model, images, tmp_path, "--checkpointing_steps", "2", "--max_train_steps", "4")
    line += ["--resume_from_checkpoint", "latest", "--train_batch_size", "2", "--learning_rate", "0.01"]
    message = one_line_error(command(*line), 1)
    assert "checkpoint 2" in message
    assert "the disk is full" in message
    assert [p.name for p in checkpointing.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_full_disk_for_the_adapter(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fera_ext.adapter import FeraAdapter

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FeraAdapter, "save", full)
    message = one_line_error(command(*arguments(model, images, tmp_path / "out")), 1)
    assert "the adapter could not be saved" in message
    assert "the disk is full" in message


def test_output_that_cannot_be_made(model: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = one_line_error(command(*arguments(model, images, tmp_path / "file" / "out")), 1)
    assert "could not be saved" in message


def test_loss_that_is_not_finite(model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="loss must be finite"):
        train(model, images, tmp_path, learning_rate=1e30, max_grad_norm=1e30, max_train_steps=5)


def test_missing_package(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = one_line_error(command(*arguments(model, images, tmp_path / "out")), 1)
    assert "must be installed" in message


def test_settings_name_the_value() -> None:
    with pytest.raises(UsageError, match="seed must be 0 or more, got -1"):
        Settings("m", Path("i"), seed=-1)


def test_help_needs_no_torch() -> None:
    code = f"{ENTRY.replace('typer.run(train)', 'import sys')}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
