"""A short side-by-side run: every operator against its plain PyTorch twin, forward and backward, one table.

On a GPU: GPU time per call of ten captured in a CUDA graph, and wall time of an eager call; on the CPU: wall time of an
eager call. Medians, the implementations take turns (fera_ext.bench.timing).
`python benchmarks/quick.py [--json FILE]`; `fera-ext bench` is the long form.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from fera_ext import ops, reference
from fera_ext.bands import Bands
from fera_ext.bench.timing import wall
from fera_ext.bench.timing_cuda import GpuTimer

CALLS = 10


def published_linear(x, weight, bias, lora_a, lora_b, gate, scale):
    """The published code's pattern, rewritten: one linear pair an expert, stacked, weighted, summed."""
    outs = [
        torch.nn.functional.linear(torch.nn.functional.linear(x, lora_a[m]), lora_b[:, m]) * scale
        for m in range(lora_a.shape[0])
    ]
    stacked = torch.stack(outs, 1)
    weights = gate.to(x.dtype).view(*gate.shape, *[1] * (x.ndim - 1))
    return torch.nn.functional.linear(x, weight, bias) + (stacked * weights).sum(1)


Calls = dict[str, Callable[[], torch.Tensor]]


def both(call: Callable[[Any], torch.Tensor]) -> Calls:
    """The same call on our operators and on their plain PyTorch twins."""
    return {"ours": lambda: call(ops), "torch": lambda: call(reference)}


def latent_cases(
    shape: tuple[int, ...], bands: Bands, device: torch.device
) -> Iterator[tuple[str, Calls, list[torch.Tensor]]]:
    """band_energy, latent_gate and fecl_loss at one latent shape; gradients to z, the router, z."""
    z = torch.randn(shape, device=device, requires_grad=True)
    base, target = torch.randn(shape, device=device), torch.randn(shape, device=device)
    router = [torch.randn(s, device=device, requires_grad=True) for s in ((64, bands.count), (64,), (3, 64), (3,))]
    label = f"{bands.name} {shape}"
    yield f"band_energy {label}", both(lambda m: m.band_energy(z, bands)), [z]
    latent = z.detach()  # a trainer's latent asks for no gradient
    yield f"latent_gate {label}", both(lambda m: m.latent_gate(latent, bands, *router, 0.7)), router
    yield f"fecl_loss {label}", both(lambda m: m.fecl_loss(base, z, target, bands)), [z]


def linear_case(
    tokens: int, size: int, experts: int, rank: int, device: torch.device, dtype: torch.dtype
) -> tuple[str, Calls, list[torch.Tensor]]:
    """expert_linear at one shape; gradients to x, A, B and the gate."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, a, b = draw(1, tokens, size), draw(experts, rank, size), draw(size, experts, rank)
    weight, bias = draw(size, size), draw(size)
    gate = torch.softmax(torch.randn(1, experts, device=device), 1)
    leaves = [t.requires_grad_() for t in (x, a, b, gate)]
    arguments = (x, weight, bias, a, b, gate, 0.25)
    calls = both(lambda m: m.expert_linear(*arguments))
    calls["published"] = lambda: published_linear(*arguments)
    return f"expert_linear {tokens}x{size}->{size} E={experts} r={rank} {str(dtype)[6:]}", calls, leaves


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Calls, list[torch.Tensor]]]:
    """Yields (name, {implementation: call}, leaves)."""
    for shape in ((4, 4, 64, 64), (4, 4, 104, 152)):
        for bands in (Bands.dog(3), Bands.author(3)):
            yield from latent_cases(shape, bands, device)
    for experts, rank in ((3, 4), (4, 32)):
        yield linear_case(1024, 640, experts, rank, device, dtype)


def step(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    out = call()
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def times_of(
    calls: Calls, leaves: list[torch.Tensor], device: torch.device, timer: GpuTimer | None
) -> dict[str, dict[str, float]]:
    """Median milliseconds by mode (eager, and captured on a GPU) and implementation."""
    runs = {name: functools.partial(step, call, leaves) for name, call in calls.items()}
    found = {"eager": wall(runs, device, rounds=30, batch_seconds=5e-3)}
    if timer:
        graphs = {}
        for name, run in runs.items():
            try:
                graphs[name] = timer.capture(run, CALLS)
            except RuntimeError as error:
                print(f"{name} is not captured: {str(error).splitlines()[0]}")
        found["graph"] = timer.warm(graphs, CALLS)
    return {mode: {name: 1e-3 * t.median for name, t in times.items()} for mode, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timer = GpuTimer(device) if device.type == "cuda" else None
    names = ("ours", "torch", "published")
    rows = []
    print(f"{'forward + backward, ms':<58}{'mode':>7}" + "".join(f"{n:>11}" for n in names))
    with timer.stream_context() if timer else nullcontext():
        for name, calls, leaves in cases(device, dtype):
            for mode, times in times_of(calls, leaves, device, timer).items():
                rows.append({"case": name, "mode": mode, "ms": times})
                shown = "".join(f"{times[n]:>11.3f}" if n in times else f"{'':>11}" for n in names)
                print(f"{name:<58}{mode:>7}{shown}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"on {where}, torch {torch.__version__}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": where, "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
