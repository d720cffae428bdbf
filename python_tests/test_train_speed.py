"""What makes a training step fast must not change what it computes: graphs, compiling, less FECL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers_train as parts
import pytest
import torch
from helpers_models import plain, randomise
from helpers_recorder import Recorder
from helpers_train import arguments, command, losses, one_line_error, train
from safetensors.torch import load_file
from torch import Tensor

from fera_ext.adapter import attach
from fera_ext.config import FeraConfig
from fera_ext.training import loop, step
from fera_ext.training.captured import CapturedStep
from fera_ext.training.errors import TrainError, UsageError
from fera_ext.training.flat import FlatParameters


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, on a machine with a GPU too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


# Less FECL.


def test_fecl_every_so_many_steps(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    passes: list[bool] = []
    predict = step.Family.predict
    monkeypatch.setattr(step.Family, "predict", lambda *a: passes.append(torch.is_grad_enabled()) or predict(*a))
    options = {"fecl_warmup_steps": 0, "max_train_steps": 5, "learning_rate": 1e-3}
    _, all_steps = train(model, images, tmp_path / "a", **options)
    # A new adapter changes nothing, so the first step's base prediction is at hand.
    assert passes == [True, *[False, True] * 4]
    passes.clear()
    _, some = train(model, images, tmp_path / "b", fecl_every=2, **options)
    assert [line["fecl"] > 0 for line in some] == [True, False, True, False, True]
    assert passes == [True, True, False, True, True, False, True]
    assert some[0] == all_steps[0]
    for line in some:
        assert line["loss"] == pytest.approx(line["mse"] + line["fecl"], rel=1e-6)


@pytest.mark.parametrize("share, rows", [(0.5, 2), (0.51, 3), (1e-9, 1), (1.0, 4)])
def test_fecl_share_of_the_batch(
    share: float,
    rows: int,
    model: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: None,
) -> None:
    from fera_ext.adapter import FeraAdapter

    given: list[tuple[Tensor, ...]] = []
    loss = FeraAdapter.fecl_loss

    def noted(self: FeraAdapter, *tensors: Tensor) -> Tensor:
        given.append(tuple(t.detach().clone() for t in tensors))
        return loss(self, *tensors)

    monkeypatch.setattr(FeraAdapter, "fecl_loss", noted)
    options = {"train_batch_size": 4, "max_train_steps": 2, "fecl_warmup_steps": 0, "learning_rate": 1e-3}
    train(model, images, tmp_path / "a", fecl_share=share, **options)
    part, given = given, []
    train(model, images, tmp_path / "b", **options)
    assert all(len(t) == rows for tensors in part for t in tensors)
    # The first samples; in the second step the two runs' weights differ.
    for few, all_of_it in zip(part[0], given[0]):
        assert torch.equal(few, all_of_it[:rows])
    assert torch.equal(part[1][2], given[1][2][:rows])
    torch.testing.assert_close(part[1][0], given[1][0][:rows], rtol=1e-4, atol=1e-5)  # the base model's


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fecl_every", "0"), "fecl_every must be at least 1, got 0"),
        (("--fecl_share", "0"), "fecl_share must be in (0, 1], got 0.0"),
        (("--fecl_share", "1.5"), "fecl_share must be in (0, 1], got 1.5"),
        (
            ("--cuda-graph", "--mixed_precision", "fp16"),
            "mixed_precision must be no or bf16 with cuda_graph, got 'fp16'",
        ),
        (
            ("--cuda_graph", "--gradient_checkpointing", "--lora_dropout", "0.1"),
            "lora_dropout must be 0 with cuda_graph and gradient_checkpointing, got 0.1",
        ),
    ],
)
def test_wrong_choice(flags: tuple[str, ...], words: str, model: Path, images: Path, tmp_path: Path) -> None:
    assert words in one_line_error(command(*arguments(model, images, tmp_path / "out", *flags)), 2)


def test_graphs_need_a_gpu(model: Path, images: Path, tmp_path: Path, on_cpu: None) -> None:
    line = arguments(model, images, tmp_path / "out", "--cuda-graph")
    assert "cuda_graph must be used with a GPU, got cpu" in one_line_error(command(*line), 2)
    with pytest.raises(UsageError, match="cuda_graph must be used with a GPU, got cpu"):
        CapturedStep(lambda inputs: inputs["x"], torch.device("cpu"))
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        CapturedStep(lambda inputs: inputs["x"], torch.device("cpu"), warmup=0, recorder=Recorder())


def test_several_processes_are_refused() -> None:
    from fera_ext.training.settings import Settings

    for name in ("compile", "cuda_graph"):
        settings = Settings("m", Path("i"), **{name: True})
        with pytest.raises(UsageError, match=f"{name} must be used with one process, got 2"):
            step.check_speed(settings, torch.device("cuda"), 2)


# Recorded steps, on a CPU.


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> Recorder:
    """What takes the place of CUDA graphs in the trainer."""
    recorder = Recorder()
    monkeypatch.setattr(step, "RECORDER", recorder)
    return recorder


RECORDED: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"lr_scheduler": "cosine", "fecl_warmup_steps": 20, "max_train_steps": 8}, 1),
    "dropout": ({"lora_dropout": 0.3, "max_train_steps": 7}, 1),
    "accumulation": ({"gradient_accumulation_steps": 3, "max_train_steps": 6, "lr_scheduler": "linear"}, 3),
    "two": ({"gradient_accumulation_steps": 2, "max_train_steps": 6, "train_batch_size": 1}, 2),
    "less-fecl": ({"fecl_every": 2, "fecl_share": 0.5, "max_train_steps": 13}, 2),
    "many": ({"gradient_accumulation_steps": 6, "train_batch_size": 1, "max_train_steps": 7}, 3),
    "no-fecl": ({"fecl_weight": 0.0, "max_train_steps": 6}, 1),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_are_the_eager_ones(
    name: str, recorder: Recorder, model: Path, images: Path, tmp_path: Path
) -> None:
    """What changes from step to step is an input: replays of one recording give the same bits as eager steps."""
    options, graphs = RECORDED[name]
    options = {"learning_rate": 1e-3, **options}
    _, eager = train(model, images, tmp_path / "a", **options)
    assert not recorder.recordings
    _, recorded = train(model, images, tmp_path / "b", cuda_graph=True, **options)
    assert recorded == eager
    assert len(recorder.recordings) == graphs
    assert all(r.replays > 1 for r in recorder.recordings)
    ends = [load_file(tmp_path / part / "fera_adapter.safetensors") for part in "ab"]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("name", ["sdxl", "flux", "pixart", "dit"])
def test_families_are_recorded(name: str, recorder: Recorder, tmp_path: Path) -> None:
    """What a denoiser is told besides is read from static tensors; nothing is read back or copied from the host."""
    model = getattr(parts, name)(tmp_path / "model")
    images = parts.write_images(tmp_path / "images", 3)
    options = {
        "resolution": 32,
        "instance_prompt": "class 1" if name == "dit" else "a cat",
        "max_train_steps": 7,
        "learning_rate": 1e-3,
        "gradient_checkpointing": name != "flux",
        "mixed_precision": "bf16" if name == "pixart" else "no",
    }
    _, eager = train(model, images, tmp_path / "a", **options)
    _, recorded = train(model, images, tmp_path / "b", cuda_graph=True, **options)
    assert recorded == eager
    assert [r.replays for r in recorder.recordings] == [3]


def test_recorded_runs_are_resumed_either_way(recorder: Recorder, model: Path, images: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 9, "learning_rate": 1e-3, "lr_scheduler": "cosine"}
    _, whole = train(model, images, tmp_path / "whole", cuda_graph=True, checkpointing_steps=5, **options)
    start = str(tmp_path / "whole" / "checkpoint-5")
    for graph in (False, True):
        out = tmp_path / str(graph)
        _, rest = train(model, images, out, cuda_graph=graph, resume_from_checkpoint=start, **options)
        assert rest == whole[5:]


def test_validation_between_replays(recorder: Recorder, tmp_path: Path) -> None:
    model = parts.flux(tmp_path / "model")
    images = parts.write_images(tmp_path / "images", 2)
    options = {"resolution": 32, "instance_prompt": "a cat", "max_train_steps": 8}
    drawn = {"validation_prompt": "a cat", "validation_steps": 3, "num_validation_images": 1}
    _, without = train(model, images, tmp_path / "a", cuda_graph=True, **options)
    _, between = train(model, images, tmp_path / "b", cuda_graph=True, validation_inference_steps=1, **drawn, **options)
    assert between == without


def test_kinds_of_input_and_numbers() -> None:
    recorder = Recorder()
    weight = torch.ones(())

    def function(inputs: Any, *, double: bool) -> Tensor:
        weight.add_(inputs["rate"])
        out = inputs["x"].sum() * weight
        return out * 2 if double else out

    run = CapturedStep(function, torch.device("cpu"), warmup=2, recorder=recorder)
    total, results = 1.0, []
    for i in range(12):
        size, double, rate = 2 + i % 2, i % 4 == 3, 0.5 * i
        total += rate
        got = run({"x": torch.full((size,), float(i)), "rate": rate}, double=double)
        results.append((got, size * i * total * (1 + double)))
    assert all(float(got) == pytest.approx(want) for got, want in results), "later calls leave results alone"
    # Sizes 2, and 3 with either variant, each three calls or more.
    assert run.graphs == len(recorder.recordings) == 3
    for _ in range(5):
        run.eager({"x": torch.ones(2, dtype=torch.float64), "rate": 0.0}, double=False)
    assert run.graphs == 3


def test_a_recording_that_fails_names_the_cause() -> None:
    run = CapturedStep(lambda inputs: inputs["x"] * inputs["x"].item(), torch.device("cpu"), recorder=Recorder())
    for _ in range(3):
        assert float(run({"x": torch.tensor(3.0)})) == 9.0
    with pytest.raises(TrainError, match=r"step could not be recorded: RuntimeError: operation not permitted") as error:
        run({"x": torch.tensor(3.0)})
    assert "\n" not in str(error.value)


def test_numbers_in_python_are_what_they_were() -> None:
    """The stand-in is as strict as a graph: this is what a ramp outside the inputs would do."""
    ramp = 0.0
    run = CapturedStep(lambda inputs: inputs["x"] * ramp, torch.device("cpu"), warmup=1, recorder=Recorder())
    got = []
    for i in range(4):
        ramp = float(i)
        got.append(float(run({"x": torch.tensor(1.0)})))
    assert got == [0.0, 1.0, 1.0, 1.0]


# Compiled models.


@contextmanager
def no_compiling_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> Iterator[None]:
    """From the step after ``steps`` on, compiling anything again is an error."""
    micro_step = loop.Trainer.micro_step

    def strict(self: Any, micro: int, batch: Any) -> Tensor:
        with torch.compiler.set_stance("fail_on_recompile" if micro >= steps else "default"):
            return micro_step(self, micro, batch)

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "micro_step", strict)
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_compiled_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    monkeypatch.setattr(step, "BACKEND", "aot_eager")
    model = getattr(parts, name)(tmp_path / "model")
    images = parts.write_images(tmp_path / "images", 3)
    options = {"resolution": 32, "instance_prompt": "a cat", "max_train_steps": 5, "learning_rate": 1e-3}
    options["gradient_checkpointing"] = name == "sd3"
    _, eager = train(model, images, tmp_path / "a", **options)
    with no_compiling_after(monkeypatch, 2):
        _, compiled = train(model, images, tmp_path / "b", compile=True, **options)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


@pytest.mark.slow
def test_compiled_with_less_fecl(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    monkeypatch.setattr(step, "BACKEND", "aot_eager")
    options = {"fecl_every": 2, "fecl_share": 0.5, "max_train_steps": 6, "learning_rate": 1e-3, "train_batch_size": 4}
    _, eager = train(model, images, tmp_path / "a", **options)
    with no_compiling_after(monkeypatch, 3):
        _, compiled = train(model, images, tmp_path / "b", compile=True, **options)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


# On a GPU.


@contextmanager
def deterministic() -> Iterator[None]:
    """The vendor's deterministic kernels, so that two runs can be compared to the bit."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # The other attention kernels stay nondeterministic where that is only warned of.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(previous)


ON_GPU: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("ddpm", {"lr_scheduler": "cosine"}),
    "dropout": ("ddpm", {"lora_dropout": 0.3}),
    "accumulation": ("ddpm", {"gradient_accumulation_steps": 3, "train_batch_size": 1}),
    "less-fecl": ("ddpm", {"fecl_every": 3, "fecl_share": 0.5}),
    "sd-bf16": ("sd", {"mixed_precision": "bf16"}),
    "sdxl-checkpointing": ("sdxl", {"gradient_checkpointing": True, "mixed_precision": "bf16"}),
    "sd3": ("sd3", {}),
    "flux": ("flux", {"mixed_precision": "bf16"}),
    "pixart": ("pixart", {"gradient_checkpointing": True}),
    "dit": ("dit", {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_captured_runs_are_the_eager_ones(name: str, tmp_path: Path) -> None:
    kind, more = ON_GPU[name]
    model = getattr(parts, kind)(tmp_path / "model")
    images = parts.write_images(tmp_path / "images", 5)
    options = {
        "resolution": 32,
        "instance_prompt": {"ddpm": None, "dit": "class 1"}.get(kind, "a cat"),
        "max_train_steps": 50,
        "learning_rate": 1e-3,
        **more,
    }
    with deterministic():
        _, eager = train(model, images, tmp_path / "a", **options)
        _, captured = train(model, images, tmp_path / "b", cuda_graph=True, **options)
        _, again = train(model, images, tmp_path / "c", cuda_graph=True, **options)
    assert captured == again
    noise = 1e-2 if more.get("mixed_precision") == "bf16" else 1e-3
    assert losses(captured) == pytest.approx(losses(eager), rel=noise)
    assert captured[-1]["lr"] == eager[-1]["lr"]


@pytest.mark.gpu
def test_captured_runs_resume_exactly(model: Path, images: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 12, "learning_rate": 1e-3, "cuda_graph": True, "validation_steps": 4}
    options.update(num_validation_images=1, validation_inference_steps=1)
    with deterministic():
        _, whole = train(model, images, tmp_path / "whole", checkpointing_steps=6, **options)
        start = str(tmp_path / "whole" / "checkpoint-6")
        _, rest = train(model, images, tmp_path / "rest", resume_from_checkpoint=start, **options)
    assert losses(rest) == pytest.approx(losses(whole[6:]), rel=1e-4)


def own_trainer(captured: bool, steps: int = 30) -> tuple[list[float], int]:
    """Losses of a trainer of one's own over three bucket sizes; and how many graphs it has."""
    device = torch.device("cuda")
    case = plain()
    case.model.to(device)
    adapter = attach(case.model, FeraConfig(target_modules=["to_q", "to_out.0"]))
    randomise(adapter)
    flat = FlatParameters(adapter.parameters())
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(flat.parameters(), lr=rate, fused=True, capturable=True)

    def function(inputs: Any) -> Tensor:
        with torch.no_grad(), adapter.disabled():
            base = case.model(inputs["z"])
        out = case.model(inputs["z"])
        loss = (out - inputs["target"]).square().mean() + adapter.fecl_loss(base, out, inputs["target"])
        loss.backward()
        flat.collect()
        torch.nn.utils.clip_grad_norm_(flat.parameters(), 1.0)
        rate.copy_(inputs["rate"])
        optimizer.step()
        return loss.detach()

    run = CapturedStep(function, device) if captured else None
    found = []
    for i in range(steps):
        generator = torch.Generator().manual_seed(i)
        shape = (2, 4, *[(8, 12), (12, 8), (16, 16)][i % 3])
        inputs: dict[str, Any] = {n: torch.randn(shape, generator=generator).to(device) for n in ("z", "target")}
        number = 1e-3 / (1 + i)
        if run is None:
            found.append(function({**inputs, "rate": torch.full((), number, device=device)}))
        else:
            found.append(run({**inputs, "rate": number}))
    return torch.stack(found).tolist(), 0 if run is None else run.graphs


@pytest.mark.gpu
def test_one_graph_a_bucket_size() -> None:
    with deterministic():
        eager, _ = own_trainer(False)
        captured, graphs = own_trainer(True)
        again, _ = own_trainer(True)
    assert graphs == 3
    assert captured == again
    assert captured == pytest.approx(eager, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("graph", [False, True])
def test_compiled_on_a_gpu(
    graph: bool, model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_train_steps": 50, "learning_rate": 1e-3, "mixed_precision": "bf16"}
    _, eager = train(model, images, tmp_path / "a", **options)
    with no_compiling_after(monkeypatch, 2):
        _, compiled = train(model, images, tmp_path / "b", compile=True, cuda_graph=graph, **options)
    # Fused kernels round less often than bfloat16 eager ones.
    assert losses(compiled) == pytest.approx(losses(eager), rel=3e-2)


FAILING = """
import torch
from fera_ext.training.captured import CapturedStep
run = CapturedStep(lambda inputs: inputs["x"] * inputs["x"].item(), torch.device("cuda"))
for _ in range(4):
    run({"x": torch.ones((), device="cuda")})
"""


@pytest.mark.gpu
def test_a_capture_that_fails_names_the_cause() -> None:
    """In a process of its own: a failed capture leaves the generator as it was during it."""
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "TrainError: cuda_graph: the step could not be recorded:" in last
    assert "captur" in last
