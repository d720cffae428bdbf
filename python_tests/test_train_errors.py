"""fera-ext train: the command, and every way to fail with one line."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_train import ENTRY, arguments, command, one_line_error, train
from safetensors.torch import load_file

from fera_ext.training import checkpointing
from fera_ext.training.errors import TrainError, UsageError
from fera_ext.training.settings import Settings


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
        ("--adam_beta1", "2", "adam_beta1 must be in [0, 1), got 2.0"),
        ("--adam_beta2", "1", "adam_beta2 must be in [0, 1)"),
        ("--adam_epsilon", "0", "adam_epsilon must be positive"),
        ("--adam_weight_decay", "-1", "adam_weight_decay must be 0 or more"),
        ("--validation_inference_steps", "2000", "validation_inference_steps must be from 1 to 1000, got 2000"),
        ("--validation_inference_steps", "0", "validation_inference_steps must be from 1 to 1000"),
        ("--seed", str(2**63), "seed must be less than 2**63"),
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


class Failing:
    """Raises what it is given, whatever it is called with."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_failed_validation_keeps_the_adapter(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fera_ext.training.families import Unconditional

    monkeypatch.setattr(Unconditional, "generate", Failing(RuntimeError("no\nsampler")))
    with pytest.warns(UserWarning, match=r"validation at step 2 failed: no$"):
        code, log = train(model, images, tmp_path, validation_steps=2, max_train_steps=2, checkpointing_steps=2)
    assert (code, len(log)) == (0, 2)
    assert (tmp_path / "fera_adapter.safetensors").is_file()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_tracker_that_fails_ends_the_tracking_only(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "log", Failing(FULL))
    monkeypatch.setattr(Accelerator, "end_training", Failing(FULL))
    with pytest.warns(UserWarning, match="No space left") as caught:
        code, log = train(model, images, tmp_path, max_train_steps=3)
    assert (code, len(log)) == (0, 3)
    said = [str(w.message) for w in caught]
    assert sum("tracking ends at step 1" in m for m in said) == 1
    assert sum("could not be closed" in m for m in said) == 1


def test_trackers_get_the_settings(model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    given: dict[str, Any] = {}
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: given.update(config))
    train(model, images, tmp_path, report_to="tensorboard", max_train_steps=1, rank=2)
    assert given["rank"] == 2
    assert given["instance_data_dir"] == str(images)
    assert all(isinstance(v, (int, float, str)) for v in given.values())


@pytest.mark.parametrize("error", [FULL, ValueError("one\ntwo"), RuntimeError("one\ntwo")])
def test_unforeseen_error_is_one_line(
    error: Exception, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fera_ext.training import loop

    monkeypatch.delenv("FERA_TRACEBACK", raising=False)
    monkeypatch.setattr(loop.Trainer, "train", Failing(error))
    line = arguments(model, images, tmp_path / "out")
    message = one_line_error(command(*line), 1)
    assert type(error).__name__ in message
    assert "FERA_TRACEBACK=1" in message
    monkeypatch.setenv("FERA_TRACEBACK", "1")
    assert "Traceback" in command(*line).stderr


def test_regular_expression_of_targets(model: Path, images: Path, tmp_path: Path) -> None:
    pattern = r"re:mid_block\..*\.to_(q|k)"
    train(model, images, tmp_path / "out", target_modules=pattern, max_train_steps=1)
    names = load_file(tmp_path / "out" / "fera_adapter.safetensors")
    adapted = {n.rsplit(".", 1)[0] for n in names if "lora_B" in n}
    assert len(adapted) == 2
    assert all("mid_block" in n for n in adapted)
    message = one_line_error(command(*arguments(model, images, tmp_path / "o", "--target_modules", "re:(")), 2)
    assert "valid regular expression" in message


def test_help_lists_the_pipelines() -> None:
    from fera_ext.training.settings import PIPELINES

    shown = "".join(c for c in command("--help").stdout if c.isalnum())
    assert all(name in shown for name in PIPELINES)
