"""A short side-by-side run: every operator against its plain PyTorch twin, forward and backward, one table.

On a GPU: median time of a CUDA graph replay and of an eager call; on the CPU: median wall time of an eager call.
`python benchmarks/quick.py [--json FILE]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fera_ext import ops, reference
from fera_ext.bands import Bands


def published_linear(x, weight, bias, lora_a, lora_b, gate, scale):
    """The published code's pattern, rewritten: one linear pair an expert, stacked, weighted, summed."""
    outs = [
        torch.nn.functional.linear(torch.nn.functional.linear(x, lora_a[m]), lora_b[:, m]) * scale
        for m in range(lora_a.shape[0])
    ]
    stacked = torch.stack(outs, 1)
    weights = gate.to(x.dtype).view(*gate.shape, *[1] * (x.ndim - 1))
    return torch.nn.functional.linear(x, weight, bias) + (stacked * weights).sum(1)


def cases(device: torch.device, dtype: torch.dtype):
    """Yields (name, {implementation: call}, leaves)."""

    def leaf(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(kind).requires_grad_()

    router = [leaf(64, 3), leaf(64), leaf(3, 64), leaf(3)]
    for shape in ((4, 4, 64, 64), (4, 4, 104, 152)):
        z, base, target = leaf(*shape), leaf(*shape).detach(), leaf(*shape).detach()
        for bands in (Bands.dog(3), Bands.author(3)):
            label = f"{bands.name} {tuple(shape)}"
            pair: Callable[[Callable[[Any], Any]], dict] = lambda f: {"ours": lambda: f(ops), "torch": lambda: f(reference)}
            yield f"band_energy {label}", pair(lambda m, z=z, b=bands: m.band_energy(z, b)), [z]
            yield f"latent_gate {label}", pair(lambda m, z=z, b=bands: m.latent_gate(z, b, *router, 0.7)), router
            yield f"fecl_loss {label}", pair(
                lambda m, z=z, b=bands, base=base, target=target: m.fecl_loss(base, z, target, b)), [z]
    for tokens, size, experts, rank in ((1024, 640, 3, 4), (1024, 640, 4, 32)):
        x, a, b = leaf(1, tokens, size, kind=dtype), leaf(experts, rank, size), leaf(size, experts, rank)
        weight, bias = leaf(size, size, kind=dtype).detach(), leaf(size, kind=dtype).detach()
        gate = torch.softmax(leaf(1, experts).detach(), 1).requires_grad_()
        arguments = (x, weight, bias, a.detach().to(dtype).requires_grad_(), b.detach().to(dtype).requires_grad_(), gate)
        yield f"expert_linear {tokens}x{size}->{size} E={experts} r={rank} {str(dtype)[6:]}", {
            "ours": lambda arguments=arguments: ops.expert_linear(*arguments, 0.25),
            "torch": lambda arguments=arguments: reference.expert_linear(*arguments, 0.25),
            "published": lambda arguments=arguments: published_linear(*arguments, 0.25),
        }, [arguments[0], *arguments[3:]]


def step(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    out = call()
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def interleaved(calls: dict[str, Callable[[], None]], seconds: float = 0.4) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns, so that a disturbance meets them all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def graphed(call: Callable[[], None]) -> Callable[[], None] | None:
    """``call`` captured into a CUDA graph, or None where it cannot be."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    print(f"{'forward + backward, ms':<58}{'mode':>7}" + "".join(f"{n:>11}" for n in ("ours", "torch", "published")))
    for name, calls, leaves in cases(device, dtype):
        def eager(call):
            def run():
                step(call, leaves)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            return run

        modes = {"eager": {n: eager(c) for n, c in calls.items()}}
        if device.type == "cuda":
            captured = {n: graphed(lambda c=c: step(c, leaves)) for n, c in calls.items()}
            modes["graph"] = {n: g for n, g in captured.items() if g is not None}
        for mode, runs in modes.items():
            times = interleaved(runs)
            rows.append({"case": name, "mode": mode, "ms": times})
            print(f"{name:<58}{mode:>7}" + "".join(
                f"{times[n]:>11.3f}" if n in times else f"{'':>11}" for n in ("ours", "torch", "published")))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"on {where}, torch {torch.__version__}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": where, "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
