"""Whole training steps and sampling loops as plain callables, and their times: eager, as one CUDA graph, compiled."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fera_ext.bench.step_contenders import Frozen, Trainee
from fera_ext.bench.step_models import Denoise
from fera_ext.bench.timing import spread, synchronise, walls
from fera_ext.bench.timing_cuda import Calls, GpuTimer

LEARNING_RATE, CLIP = 1e-4, 1.0
WARM_UPS = 3
GUIDANCE, SAMPLING_STEPS = 7.5, 30
EULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The scheduler of SD1.5 and SDXL."""
BACKEND = "inductor"
LONG_US = 200e3
"""A graph that replays for longer is replayed once a sample."""

Call = Callable[[], Tensor]
"""One step or loop; gives the loss, or the predicted latents."""


def step_call(name: str, trainee: Trainee, denoise: Denoise) -> Call:
    """One call of a contender: a training step with clipping and AdamW, the frozen model's step to the latent, or its
    forward alone. Gives the loss, or the prediction; nothing in it waits for the device."""
    if name == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return trainee.predict(denoise)

        return forward
    if isinstance(trainee, Frozen):

        def frozen() -> Tensor:
            loss = trainee.loss(denoise)
            # Into a leaf's .grad, as a trainer's backward pass does.
            trainee.latent.grad = None
            loss.backward()
            return loss.detach()

        return frozen
    flat = trainee.flat
    parameters = list(flat.parameters()) if flat else trainee.parameters
    on_gpu = parameters[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True, capturable=on_gpu)

    def train() -> Tensor:
        # To None: the backward pass writes gradients into new memory, in a capture the graph's own.
        (flat or optimizer).zero_grad(set_to_none=True)
        loss = trainee.loss(denoise)
        loss.backward()
        if flat:
            flat.collect()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.detach()

    return train


def sampling_call(trainee: Trainee, denoise: Denoise, steps: int = SAMPLING_STEPS) -> Call:
    """A sampling loop with classifier-free guidance from a fixed start to the final latents (B, 4, H, W).

    The contender's batch holds 2·B samples: without and with the text. The scheduler's numbers are known beforehand, so
    the whole loop can be one graph.
    """
    from diffusers import EulerDiscreteScheduler

    batch = trainee.batch
    prepared: Any = EulerDiscreteScheduler(**EULER)
    prepared.set_timesteps(steps, device=batch.latent.device)
    prepared.set_begin_index(0)  # else it looks its place up in a tensor on the device, and waits for it
    start = batch.latent[: batch.samples // 2] * float(prepared.init_noise_sigma)
    batches = [replace(batch, inputs={**batch.inputs, "timestep": t}) for t in prepared.timesteps.unbind()]

    def sample() -> Tensor:
        scheduler, latent = copy.copy(prepared), start
        with torch.no_grad(), trainee.context():
            for now in batches:
                t = now.inputs["timestep"]
                both = scheduler.scale_model_input(torch.cat([latent, latent]), t)
                without, with_text = now.predict(denoise, both.to(start.dtype)).chunk(2)
                guided = without + GUIDANCE * (with_text - without)
                latent = scheduler.step(guided, t, latent, return_dict=False)[0].to(start.dtype)
        return latent

    return sample


def without_gradients(trainee: Trainee) -> None:
    """Drops all gradients, which may live in a graph's memory."""
    for parameter in trainee.parameters:
        parameter.grad = None
    if trainee.flat:
        trainee.flat.zero_grad(set_to_none=True)
    if isinstance(trainee, Frozen):
        trainee.latent.grad = None


def free(timer: GpuTimer | None) -> None:
    """Gives back the memory of what is gone."""
    gc.collect()
    if timer:
        torch.cuda.empty_cache()


@dataclass
class Taken:
    """What one mode of a contender gave.

    Attributes:
        microseconds: samples.
        peak_bytes: all that was allocated at most, the model with it; None on a CPU.
        answer: the last loss or prediction, copied.
        fields: further fields of the row.
    """

    microseconds: list[float]
    peak_bytes: int | None
    answer: Tensor
    fields: dict[str, Any]

    def milliseconds(self) -> dict[str, float]:
        """Median, p10, p90 and number of samples."""
        return {k: v if k == "samples" else v / 1e3 for k, v in asdict(spread(self.microseconds)).items()}


def eager(
    call: Call,
    device: torch.device,
    timer: GpuTimer | None,
    rounds: int,
    warm_ups: int = WARM_UPS,
    frozen: Call | None = None,
) -> Taken:
    """Wall time of single calls, each with the wait for its end.

    ``frozen``, the frozen model's step, is called in turns with ``call``, so that a host whose speed drifts is the same
    for both; the median of its times is the field ``frozen_beside_ms``.
    """
    calls = [call] if frozen is None else [call, frozen]
    turns: list[list[float]] = [[] for _ in calls]
    for number in range(warm_ups + rounds):
        for one, times in zip(calls, turns):
            if number < warm_ups:
                one()
            else:
                times += walls(one, device, 1)
    fields = {} if frozen is None else {"frozen_beside_ms": spread(turns[1]).median / 1e3}
    kept: list[Tensor] = []

    def last() -> None:
        kept[:] = [call()]

    if timer is None:
        last()
        return Taken(turns[0], None, kept[0].clone(), fields)
    gc.collect()
    standing = int(torch.cuda.memory_allocated(timer.device))
    return Taken(turns[0], standing + timer.peak_bytes(last), kept[0].clone(), fields)


def graph(call: Call, trainee: Trainee, timer: GpuTimer, rounds: int, warm_ups: int = WARM_UPS) -> Taken:
    """GPU time of the whole call as one CUDA graph, replayed; its memory is given back.

    Warm-up and capture run on the timer's stream, which is not the default one. The warm-up makes the optimiser's
    state and every cache; the gradients are dropped, so that the captured backward pass puts new ones into the graph's
    memory, and each replay writes them there again.

    Raises:
        RuntimeError: something in the call cannot be captured.
    """
    for _ in range(warm_ups):
        call()
    kept: list[Tensor] = []

    def captured() -> None:
        kept[:] = [call()]

    held = None
    try:
        without_gradients(trainee)
        free(timer)
        torch.cuda.reset_peak_memory_stats(timer.device)
        held = timer.capture(captured, 1)
        peak = int(torch.cuda.max_memory_allocated(timer.device))
        once = timer.replays({"call": held}, 1)["call"][0]
        # Several in a row: from the second on the GPU does not wait for the host's launch, as in a training loop.
        several = 1 if once > LONG_US else 2
        times = timer.replays({"call": Calls(held.replay, several)}, rounds)["call"]
        answer = kept[0].clone()
        synchronise(timer.device)
        return Taken([t / several for t in times], peak, answer, {})
    finally:
        kept.clear()
        without_gradients(trainee)
        if held is not None:
            held.reset()
        del held
        free(timer)


def forget_compiled() -> None:
    """Drops everything torch.compile has made, and the models it was made for."""
    import torch._dynamo

    torch._dynamo.reset()


def compiled_model(model: nn.Module) -> Any:
    """The denoiser under torch.compile, in one graph and for fixed shapes, with nothing compiled before."""
    from torch._dynamo.utils import counters

    forget_compiled()
    counters.clear()
    return torch.compile(model, fullgraph=True, dynamic=False, backend=BACKEND)


def compiled(
    call: Call, device: torch.device, timer: GpuTimer | None, rounds: int, warm_ups: int = WARM_UPS
) -> tuple[Taken, float]:
    """Wall time of calls around a denoiser from :func:`compiled_model`, and the seconds of the first two calls.

    The fields are ``compile_seconds``, ``graph_breaks`` (fullgraph makes one an error) and ``recompilations``: graphs
    made after the first two calls.
    """
    from torch._dynamo.utils import counters

    start = time.perf_counter()
    call()
    call()
    synchronise(device)
    seconds = time.perf_counter() - start
    graphs = counters["stats"]["unique_graphs"]
    taken = eager(call, device, timer, rounds, warm_ups)
    taken.fields = {
        "compile_seconds": seconds,
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompilations": counters["stats"]["unique_graphs"] - graphs,
    }
    return taken, seconds
