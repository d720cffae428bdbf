"""expert_linear on tensor cores (mma, wgmma), forced on a GPU: values, gradients, bits, capture, refusals."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from fera_ext import ops, reference

pytestmark = pytest.mark.gpu

VARIABLE = "FERA_EXPERT_VARIANT"
SHAPES = [
    # gate rows, tokens of each, in, out, E, r
    (2, 4096, 320, 320, 3, 4),
    (4, 1024, 640, 1280, 3, 4),
    (1, 333, 1288, 72, 1, 15),
    (3, 77, 2048, 640, 3, 5),
    (2, 256, 640, 640, 2, 16),
    (1, 2048, 3072, 256, 4, 8),
]
WIDE = [(2, 1024, 640, 320, 4, 32), (3, 128, 320, 1280, 3, 16), (1, 700, 1280, 640, 8, 64)]
PLACE = "FERA_EXPERT_PLACE"
"""Where h of wide ranks is made: beside the product's tiles, or by kernels of their own (outside)."""
HALVES = [torch.bfloat16, torch.float16]
NAMES = ("x", "lora_a", "lora_b", "gate")


@pytest.fixture(params=["mma", "wgmma"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one for the test; wgmma needs Hopper."""
    if request.param == "wgmma" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs sm_90")
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def arguments(shape: tuple[int, ...], dtype: torch.dtype, masters: torch.dtype, bias: bool = True) -> dict[str, Any]:
    """What expert_linear takes, random, on the GPU; the four of NAMES ask for gradients."""
    groups, tokens, width, out, experts, rank = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*sizes: int, by: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(sizes, generator=generator, device="cuda") * by).to(to)

    made = {
        "x": drawn(groups, tokens, width),
        "weight": drawn(out, width, by=width**-0.5),
        "bias": drawn(out) if bias else None,
        "lora_a": drawn(experts, rank, width, by=width**-0.5, to=masters),
        "lora_b": drawn(out, experts, rank, by=rank**-0.5, to=masters),
        "gate": torch.softmax(drawn(groups, experts, to=torch.float32), 1),
        "scale": 0.7,
    }
    for name in NAMES:
        made[name].requires_grad_()
    return made


def results(module: Any, given: dict[str, Any], dy: Tensor) -> list[Tensor]:
    """The output and the gradients of the four that ask."""
    out = module.expert_linear(**given)
    return [out.detach(), *torch.autograd.grad(out, [given[n] for n in NAMES], dy.to(out.dtype))]


def exact(given: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, A and B rounded to x's dtype first, as the operator's contract says."""
    low = given["x"].dtype

    def widen(name: str, v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        v = v.detach().to(low) if name.startswith("lora") else v.detach()
        return v.double().requires_grad_(name in NAMES)

    return {name: widen(name, v) for name, v in given.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("masters", [True, False], ids=["masters", "low"])
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_matches_float64(variant: str, shape: tuple[int, ...], dtype: torch.dtype, masters: bool) -> None:
    if variant == "mma" and shape in WIDE:
        pytest.skip("mma takes R up to 32")
    given = arguments(shape, dtype, torch.float32 if masters else dtype)
    dy = torch.randn(*given["x"].shape[:-1], shape[3], device="cuda", dtype=dtype)
    got = results(ops, given, dy)
    ref = results(reference, exact(given), dy)
    plain = results(reference, given, dy)
    for name, a, b, c in zip(("y", *NAMES), got, ref, plain):
        error = tolerances.error(a, b)
        assert error <= tolerances.LOW[dtype], (name, error)
        assert error <= tolerances.SLACK * tolerances.error(c, b) + 1e-5, (name, error, tolerances.error(c, b))


@pytest.fixture(params=[4, 32])
def rank(request: pytest.FixtureRequest, variant: str) -> int:
    """Of three experts, narrow and wide; mma takes R up to 32."""
    if variant == "mma" and request.param == 32:
        pytest.skip("mma takes R up to 32")
    return request.param


@pytest.mark.parametrize("place", ["beside", "outside"])
@pytest.mark.parametrize("shape", [*WIDE, (4, 988, 320, 200, 4, 32), (20, 64, 40, 104, 4, 32)], ids=str)
def test_places_of_wide_ranks(shape: tuple[int, ...], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fill their gate row's last tile, many gate rows, one; more ranks than a tile."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs sm_90")
    monkeypatch.setenv(VARIABLE, "wgmma")
    monkeypatch.setenv(PLACE, place)
    given = arguments(shape, torch.bfloat16, torch.float32)
    dy = torch.randn(*given["x"].shape[:-1], shape[3], device="cuda", dtype=torch.bfloat16)
    for name, a, b in zip(("y", *NAMES), results(ops, given, dy), results(reference, exact(given), dy)):
        assert tolerances.error(a, b) <= tolerances.LOW[torch.bfloat16], name


@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_for_what_asks(variant: str, rank: int, wanted: int) -> None:
    given = arguments((2, 160, 320, 200, 3, rank), torch.bfloat16, torch.float32)
    dy = torch.randn(2, 160, 200, device="cuda", dtype=torch.bfloat16)
    whole = dict(zip(NAMES, results(ops, given, dy)[1:]))
    names = [n for i, n in enumerate(NAMES) if wanted >> i & 1]
    asked = {k: v.detach().requires_grad_(k in names) if isinstance(v, Tensor) else v for k, v in given.items()}
    grads = torch.autograd.grad(ops.expert_linear(**asked), [asked[n] for n in names], dy)
    for name, grad in zip(names, grads):
        if variant == "wgmma" and "x" not in names:
            # The product that writes dx makes dh too; without one a kernel does that sums in another order.
            assert tolerances.error(grad, whole[name]) <= tolerances.LOW[torch.bfloat16], name
        else:
            assert torch.equal(grad, whole[name]), name


def test_same_bits_twice(variant: str, rank: int) -> None:
    given = arguments((2, 1000, 640, 648, 3, rank), torch.bfloat16, torch.float32)
    dy = torch.randn(2, 1000, 648, device="cuda", dtype=torch.bfloat16)
    for a, b in zip(results(ops, given, dy), results(ops, given, dy)):
        assert torch.equal(a, b)


def test_graph_capture(variant: str, rank: int) -> None:
    given = arguments((2, 512, 320, 320, 3, rank), torch.bfloat16, torch.float32)
    dy = torch.randn(2, 512, 320, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(ops, given, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(ops, given, dy)
    for _ in range(2):
        with torch.no_grad():
            for name in NAMES:
                given[name].mul_(0.9)
        graph.replay()
        for a, b in zip(captured, results(ops, given, dy)):
            assert torch.equal(a, b)


def test_strided_rows(variant: str, rank: int) -> None:
    shape = (2, 300, 320, 200, 3, rank)
    given = arguments(shape, torch.bfloat16, torch.float32)
    dy = torch.randn(2, 300, 200, device="cuda", dtype=torch.bfloat16)
    want = results(ops, given, dy)
    wide = torch.randn(2, 300, 640, device="cuda", dtype=torch.bfloat16)
    wide[..., 160:480] = given["x"].detach()
    given["x"] = wide[..., 160:480].requires_grad_()
    for a, b in zip(results(ops, given, dy), want):
        if variant == "wgmma":
            assert torch.equal(a, b)
        else:  # the vendor's base product may choose another kernel for other strides
            assert tolerances.error(a, b) <= tolerances.LOW[torch.bfloat16]


def test_a_nan_stays_in_its_token(variant: str) -> None:
    given = arguments((1, 64, 320, 320, 3, 4), torch.bfloat16, torch.float32)
    with torch.no_grad():
        given["x"][0, 17, 3] = torch.nan
    out = ops.expert_linear(**given)
    assert out[0, 17].isnan().all()
    assert out[0, :17].isfinite().all()
    assert out[0, 18:].isfinite().all()


def test_what_a_variant_does_not_take_is_refused(variant: str) -> None:
    given = arguments((2, 64, 320, 320, 3, 4), torch.float32, torch.float32)
    with pytest.raises(ValueError, match=re.escape("x is not of 16 bits")):
        ops.expert_linear(**given)


@pytest.mark.parametrize(
    "shape",
    [(2, 64, 320, 320, 3, 16), (8, 8, 320, 320, 3, 4), (1, 64, 324, 320, 3, 4), (1, 64, 320, 321, 3, 4)],
    ids=str,
)
def test_auto_serves_what_they_do_not_take(shape: tuple[int, ...]) -> None:
    given = arguments(shape, torch.bfloat16, torch.float32)
    dy = torch.randn(*given["x"].shape[:-1], shape[3], device="cuda", dtype=torch.bfloat16)
    got, ref = results(ops, given, dy), results(reference, exact(given), dy)
    for a, b in zip(got[:-1], ref[:-1]):
        assert tolerances.error(a, b) <= tolerances.LOW[torch.bfloat16]
    # A share of the gate's gradient is a sum of terms h dh of both signs, one a token and rank: rounding is of their
    # size, not of the sum's.
    wide = exact(given)
    h = torch.einsum("nti,eri->nter", wide["x"], wide["lora_a"])
    terms = h * torch.einsum("nto,oer->nter", dy.double(), wide["lora_b"]) * wide["scale"]
    assert ((got[-1] - ref[-1]).abs() <= 2 * tolerances.LOW[torch.bfloat16] * terms.square().sum((1, 3)).sqrt()).all()


def test_an_expanded_upstream_gradient() -> None:
    given = arguments((2, 128, 320, 320, 3, 4), torch.bfloat16, torch.float32)
    repeated = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(2, 128, 320)
    for a, b in zip(results(ops, given, repeated), results(ops, given, repeated.contiguous())):
        assert tolerances.error(a, b) <= tolerances.LOW[torch.bfloat16]


def test_the_first_call_of_a_thread(variant: str, rank: int) -> None:
    given = arguments((2, 512, 320, 320, 3, rank), torch.bfloat16, torch.float32)
    dy = torch.randn(2, 512, 320, device="cuda", dtype=torch.bfloat16)
    want = results(ops, given, dy)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(results(ops, given, dy)))
    thread.start()
    thread.join()
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("each", [4, 32])
def test_kernels_a_layer(each: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    given = arguments((4, 1024, 1280, 1280, 3, each), torch.bfloat16, torch.float32)
    dy = torch.randn(4, 1024, 1280, device="cuda", dtype=torch.bfloat16)
    results(ops, given, dy)
    counts = []
    for backward in (False, True):
        out = ops.expert_linear(**given)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as session:
            if backward:
                torch.autograd.grad(out, [given[n] for n in NAMES], dy)
            else:
                ops.expert_linear(**given)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        counts.append(sum(e.device_type == on_device for e in session.events() or ()))
    wide = each == 32 and torch.cuda.get_device_capability() != (9, 0)  # the vendor's products
    assert counts[0] <= (5 if wide else 3)
    assert counts[1] <= (13 if wide else 5)
