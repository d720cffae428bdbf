"""The CUDA variants of the band kernels, each forced: values, bits, capture, launches, streams, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import tolerances
import torch
from helpers_ops import Captured, assert_matches_float64
from samples import ROUTER_LEAVES, Sample, latent, predictions, router_weights

from fera_ext import ops
from fera_ext.bands import Bands
from fera_ext.info.variants import VARIABLE, band_variant

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
OPS = ("band_energy", "latent_gate", "fecl_loss")


def _sample(op: str, shape: tuple[int, ...], bands: Bands) -> Sample:
    note = f"{bands.name}-{'x'.join(map(str, shape))}"
    if op == "fecl_loss":
        return Sample(op, {**predictions(*shape), "bands": bands}, ("fera",), note)
    arguments = {"z": latent(*shape), "bands": bands}
    if op == "band_energy":
        return Sample(op, arguments, ("z",), note)
    return Sample(op, {**arguments, **router_weights(bands.count, 3), "tau": 0.7}, ("z", *ROUTER_LEAVES), note)


BOTH = [_sample(op, shape, Bands.dog(3)) for op in OPS for shape in ((2, 4, 64, 64), (2, 5, 128, 128))]
BLURS = [
    _sample(op, shape, bands)
    for op in OPS
    for shape, bands in (
        ((3, 3, 37, 20), Bands.author(3)),
        ((2, 4, 64, 64), Bands.author(3)),
        ((1, 19, 50, 61), Bands.author(4)),
        ((2, 5, 128, 128), Bands.author(3)),
        ((1, 4, 104, 152), Bands.author(2)),
    )
]
GRID_ONLY = [_sample(op, (3, 3, 37, 20), Bands.dog(3)) for op in OPS]
CASES = [
    pytest.param(variant, sample, id=f"{variant}-{sample}")
    for variant, found in (("cluster", BOTH), ("strips", BLURS), ("grid", BOTH + GRID_ONLY + BLURS[:2]))
    for sample in found
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _force(monkeypatch: pytest.MonkeyPatch, variant: str, sample: Sample, dtype: torch.dtype) -> None:
    """Forces a variant; skips where the GPU has none, and for nothing else: sm_90 must have the usual sizes."""
    shape = sample.arguments["fera" if sample.op == "fecl_loss" else "z"].shape
    monkeypatch.setenv(VARIABLE, variant)
    if variant != "grid" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs thread block clusters (sm_90)")
    assert band_variant(tuple(shape), dtype, sample.arguments["bands"], CUDA) == variant


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant,sample", CASES)
def test_matches_float64(variant: str, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _force(monkeypatch, variant, sample, dtype)
    assert_matches_float64(sample, dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant,sample", CASES)
def test_same_bits_twice(variant: str, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _force(monkeypatch, variant, sample, dtype)
    given = sample.cast(dtype, CUDA)
    first, again = given.gradients(ops), given.gradients(ops)
    for a, b in zip([first[0], *first[1]], [again[0], *again[1]]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant,sample", CASES)
def test_replayed_graph(variant: str, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three replays with other inputs each: what a launch leaves in its workspace must not reach the next."""
    _force(monkeypatch, variant, sample, dtype)
    captured = Captured(sample.cast(dtype, CUDA))
    seen = []
    for factor in (0.75, -1.5, 1.25):
        with torch.no_grad():
            for leaf in captured.leaves:
                leaf.mul_(factor)
        got, expected = captured.replay(), captured.eager()
        for a, b in zip(got, expected):
            assert torch.equal(a, b), tolerances.error(a, b)
        seen.append(got)
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1])), "a replay must follow its inputs"


CLUSTER = "FERA_BAND_CLUSTER"
PLANS = [
    pytest.param(plan, sample, id=f"{plan}-{sample}")
    for sample, plans in (
        (_sample("band_energy", (2, 5, 128, 128), Bands.dog(3)), ("blocks=1", "blocks=1,threads=512", "blocks=8")),
        (_sample("latent_gate", (2, 5, 128, 128), Bands.dog(3)), ("blocks=1", "blocks=8", "blocks=16,clusters=2")),
        (
            _sample("fecl_loss", (2, 5, 128, 128), Bands.dog(3)),
            ("blocks=8,launches=1", "blocks=8,launches=2", "blocks=8,clusters=3,launches=1", "blocks=16,clusters=2"),
        ),
        (_sample("fecl_loss", (3, 4, 64, 64), Bands.dog(4)), ("clusters=2,launches=1", "threads=512,launches=2")),
        (
            _sample("fecl_loss", (2, 3, 128, 128), Bands.rings(4)),
            ("blocks=1,launches=1", "split=1,launches=2", "split=2"),
        ),
        (_sample("fecl_loss", (1, 7, 104, 156), Bands.dog(3)), ("split=1,launches=1", "split=1,launches=2", "split=4")),
        (_sample("band_energy", (2, 3, 64, 64), Bands.dog(3)), ("split=1", "split=1,launches=2")),
        (_sample("band_energy", (2, 3, 128, 128), Bands.dog(3)), ("real=1", "real=2", "real=2,launches=2")),
        (_sample("latent_gate", (2, 16, 128, 128), Bands.rings(4)), ("real=1", "real=2")),
        (_sample("latent_gate", (3, 4, 72, 128), Bands.rings(4)), ("split=1", "split=1,launches=2")),
        (_sample("band_energy", (1, 5, 104, 152), Bands.dog(3)), ("split=1", "split=4", "split=4,launches=2")),
        (_sample("fecl_loss", (2, 5, 72, 128), Bands.dog(3)), ("split=1,launches=1", "split=1,launches=2")),
        (_sample("fecl_loss", (1, 5, 104, 152), Bands.dog(3)), ("split=4,launches=1", "split=4,launches=2")),
        (_sample("latent_gate", (2, 5, 104, 156), Bands.dog(3)), ("split=2", "split=4")),
    )
    for plan in plans
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan,sample", PLANS)
def test_forced_clusters(plan: str, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of clusters and blocks that such a latent does not take by itself: values, bits and replays."""
    monkeypatch.setenv(CLUSTER, plan)
    _force(monkeypatch, "cluster", sample, dtype)
    assert_matches_float64(sample, dtype, CUDA)
    given = sample.cast(dtype, CUDA)
    first, again = given.gradients(ops), given.gradients(ops)
    for a, b in zip([first[0], *first[1]], [again[0], *again[1]]):
        assert torch.equal(a, b)
    captured = Captured(sample.cast(dtype, CUDA))
    for factor in (0.75, -1.5):
        with torch.no_grad():
            for leaf in captured.leaves:
                leaf.mul_(factor)
        for a, b in zip(captured.replay(), captured.eager()):
            assert torch.equal(a, b), tolerances.error(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4, 16, 128, 128), (9, 15, 128, 128), (130, 1, 128, 128), (5, 27, 104, 156), (4, 56, 72, 128), (2, 4, 104, 152)],
    ids=str,
)
def test_fecl_of_many_planes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What goes by planes by itself: all side by side, and more than that; more samples than a block keeps."""
    sample = _sample("fecl_loss", shape, Bands.dog(3))
    assert_matches_float64(sample, dtype, CUDA)
    given = sample.cast(dtype, CUDA)
    first, again = given.gradients(ops), given.gradients(ops)
    for a, b in zip([first[0], *first[1]], [again[0], *again[1]]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS[:2])
@pytest.mark.parametrize(
    "shape",
    [(4, 16, 128, 128), (4, 16, 104, 156), (4, 56, 72, 128), (9, 15, 128, 128), (18, 15, 128, 128)],
    ids=str,
)
def test_many_planes(op: str, shape: tuple[int, ...]) -> None:
    """Energies and adjoint of as many planes as go by planes by themselves, and of more than run side by side."""
    sample = _sample(op, shape, Bands.dog(3))
    assert_matches_float64(sample, torch.float32, CUDA)
    given = sample.cast(torch.float32, CUDA)
    first, again = given.gradients(ops), given.gradients(ops)
    for a, b in zip([first[0], *first[1]], [again[0], *again[1]]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("plan", ["nonsense", "blocks=0", "threads=100"])
def test_an_unknown_plan(op: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLUSTER, plan)
    given = _sample(op, (2, 4, 64, 64), Bands.dog(3)).cast(torch.float32, CUDA)
    sentence = f"{op}: {CLUSTER} must be like blocks=8,threads=256,clusters=2,pairs=1,launches=2,split=2, got {plan}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        given.run(ops)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("plan", ["blocks=3", "threads=32", "split=3", "real=1"])
def test_no_such_cluster(op: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = _sample(op, (2, 4, 64, 64), Bands.dog(3)).cast(torch.float32, CUDA)
    monkeypatch.setenv(CLUSTER, plan)
    assert band_variant((2, 4, 64, 64), torch.float32, Bands.dog(3), CUDA) == ""
    sentence = f"{op}: {CLUSTER} must be one that this device, size, dtype, layout and these bands have, got {plan}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        given.run(ops)


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_variant(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nonsense")
    given = _sample(op, (2, 4, 64, 64), Bands.dog(3)).cast(torch.float32, CUDA)
    sentence = f"{op}: FERA_BAND_VARIANT must be auto, cluster, strips or grid, got nonsense"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        given.run(ops)


REFUSED = "auto or another variant for this device, size, dtype, layout and these bands"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "variant,shape,bands,dtype",
    [
        ("cluster", (2, 4, 24, 40), Bands.dog(3), torch.float32),
        ("cluster", (2, 4, 64, 64), Bands.author(3), torch.float32),
        ("cluster", (2, 4, 64, 64), Bands.dog(3), torch.float64),
        ("strips", (2, 4, 64, 64), Bands.dog(3), torch.float32),
        ("strips", (2, 4, 24, 40), Bands.author(5), torch.float32),
        ("strips", (2, 4, 64, 64), Bands.author(3), torch.float64),
    ],
    ids=["size", "author", "float64", "spectral", "blurs", "float64-author"],
)
def test_no_such_kernel(
    op: str, variant: str, shape: tuple[int, ...], bands: Bands, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forced variant that a latent does not have is refused, never replaced by another one."""
    given = _sample(op, shape, bands).cast(dtype, CUDA)
    given.run(ops)  # without the force it works
    monkeypatch.setenv(VARIABLE, variant)
    assert band_variant(shape, dtype, bands, CUDA) == ""
    sentence = f"{op}: FERA_BAND_VARIANT must be {REFUSED}, got {variant}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        given.run(ops)


def test_a_refused_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is read at each launch, so also between forward and backward."""
    z = torch.randn(2, 4, 24, 40, device=CUDA, requires_grad=True)
    out = ops.band_energy(z, Bands.dog(3)).sum()
    monkeypatch.setenv(VARIABLE, "cluster")
    with pytest.raises(ValueError, match=f"^band_energy_backward: FERA_BAND_VARIANT must be {REFUSED}"):
        out.backward()


def _activity(run: Callable[[], object]) -> tuple[list[str], list[str]]:
    """What one call does on the device (kernels, fills, copies), and its calls that wait for the device."""
    from torch.profiler import ProfilerActivity, profile, record_function

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as session:
        torch.cuda._sleep(1000)  # the first activities of a session may be lost
        torch.cuda.synchronize()
        with record_function("measured"):
            run()
        torch.cuda.synchronize()
    events = list(session.events() or ())
    on_device = torch.autograd.DeviceType.CUDA
    span = next(e.time_range for e in events if e.name == "measured" and e.device_type != on_device)
    # The annotation itself and what CUPTI adds about buffers and synchronisation are no launches.
    added = ("measured", "Activity Buffer", "Command Buffer", "Context Sync", "Stream Sync", "Event Sync")
    work = [
        e.name
        for e in events
        if e.device_type == on_device and e.time_range.start >= span.start and not e.name.startswith(added)
    ]
    waits = [
        e.name
        for e in events
        if e.device_type != on_device
        and re.match(r"cu(da)?\w*Synchronize|cu(da)?Memcpy", e.name)
        and span.start <= e.time_range.start <= span.end
    ]
    return work, waits


def _custom(height: int, width: int) -> Bands:
    masks = torch.rand(3, height, width // 2 + 1, generator=torch.Generator().manual_seed(3))
    mirrored = torch.roll(masks.flip(1), 1, dims=1)
    masks[:, :, (0, -1)] = (masks[:, :, (0, -1)] + mirrored[:, :, (0, -1)]) / 2
    return Bands.custom(masks)


@pytest.mark.parametrize(
    "shape", [(4, 4, 64, 64), (2, 4, 96, 96), (4, 16, 64, 64), (4, 16, 128, 128), (8, 16, 128, 128)], ids=str
)
@pytest.mark.parametrize("name", ["dog", "rings", "custom", "author"])
@pytest.mark.parametrize(
    "op,leaves,forward,backward",
    [
        ("latent_gate", ROUTER_LEAVES, 1, 1),
        ("band_energy", ("z",), 1, 2),
        ("fecl_loss", ("fera",), 2, 2),
    ],
    ids=OPS[1:2] + OPS[:1] + OPS[2:],
)
def test_launches(
    op: str, leaves: tuple[str, ...], forward: int, backward: int, name: str, shape: tuple[int, ...]
) -> None:
    """At most so many activities on the device a call; no copy, and the host never waits."""
    bands = _custom(*shape[-2:]) if name == "custom" else getattr(Bands, name)(3)
    sample = _sample(op, shape, bands)
    sample.leaves = leaves
    given = sample.cast(torch.float32, CUDA)
    out = given.run(ops)
    upstream = given.upstream(out)
    tensors = [given.arguments[leaf] for leaf in leaves]
    runs: list[tuple[int, Callable[[], object]]] = [
        (forward, lambda: given.run(ops)),
        (backward, lambda: torch.autograd.grad(out, tensors, upstream, retain_graph=True)),
    ]
    for most, run in runs:
        work, waits = _activity(run)
        assert 1 <= len(work) <= most, work
        assert not [w for w in work if "memcpy" in w.lower()], work
        assert not waits


def test_concurrent_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several clusters share a sample and agree through the workspace: launches in flight together must not meet."""
    monkeypatch.setenv(VARIABLE, "auto")
    weights = {k: v.to(CUDA, torch.float32) for k, v in router_weights(3, 3).items()}
    latents = [latent(1, 16, 128, 128, seed=seed).to(CUDA, torch.float32) for seed in range(4)]

    if torch.cuda.get_device_capability() >= (9, 0):
        assert band_variant((1, 16, 128, 128), torch.float32, Bands.dog(3), CUDA) == "cluster"

    def gate(z: torch.Tensor) -> torch.Tensor:
        return ops.latent_gate(z, Bands.dog(3), **weights, tau=0.7)

    serial = [gate(z) for z in latents]
    assert not torch.equal(serial[0], serial[1])
    streams = [torch.cuda.Stream() for _ in latents]
    torch.cuda.synchronize()
    found: list[list[torch.Tensor]] = [[] for _ in latents]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms: all queues fill before any runs
    for _ in range(100):
        for stream, z, outs in zip(streams, latents, found):
            with torch.cuda.stream(stream):
                outs.append(gate(z))
    torch.cuda.synchronize()
    for expected, outs in zip(serial, found):
        assert all(torch.equal(out, expected) for out in outs)
