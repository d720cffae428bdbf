"""What every operator owes, over one table of samples: twins, gradients, registration, compile, capture."""

from __future__ import annotations

import inspect
import threading
from dataclasses import replace

import pytest
import tolerances
import torch
from helpers_ops import LINEARS, Captured, assert_matches_float64
from samples import LINEAR_LEAVES, MASTERS, Sample, samples
from torch.library import opcheck
from torch.utils._pytree import tree_leaves, tree_map

from fera_ext import ops, reference
from fera_ext.bands import Bands

ALL = samples()


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("sample", ALL, ids=str)
def test_matches_float64(sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradients against the float64 twin on the same (rounded) inputs, and against plain torch."""
    assert_matches_float64(sample, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", [s for s in ALL if set(s.leaves) & set(MASTERS)], ids=str)
def test_float32_masters(sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    """Adapter or router in float32, data in 16 bits: each gradient has its own tensor's dtype."""
    given = sample.cast(dtype, device, master=torch.float32)
    out, grads = given.gradients(ops)
    upstream = given.upstream(out)
    ref_out, ref_grads = given.cast(torch.float64, device).gradients(reference, upstream)
    for name, got, ref in zip(("output", *sample.leaves), [out, *grads], [ref_out, *ref_grads]):
        if name != "output":
            assert got.dtype == given.arguments[name].dtype
        assert tolerances.error(got, ref) <= (
            tolerances.LOW[dtype]
            if sample.op in LINEARS
            else max(tolerances.ENERGY_F32, tolerances.LOW.get(got.dtype, 0))
        ), name


@pytest.mark.parametrize("sample", samples(small=True), ids=str)
def test_gradcheck(sample: Sample, device: torch.device) -> None:
    given = sample.cast(torch.float64, device)
    leaves = [given.arguments[n] for n in given.leaves]

    def call(*values: torch.Tensor) -> torch.Tensor:
        given.arguments.update(zip(given.leaves, values))
        return given.run(ops)

    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every fera_ext operator call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fera_ext":
            detached = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, args)
            self.calls.append((func, detached))
        return func(*args, **(kwargs or {}))


def _asking(func: torch._ops.OpOverload, args: tuple, given: Sample) -> tuple:
    """The operator's arguments with its leaves asking for gradients."""
    leaves = {n.rstrip("0123456789") if given.op == "expert_linear_group" else n for n in given.leaves}
    positions = [i for i, a in enumerate(func._schema.arguments) if a.name in leaves]
    return tuple(tree_map(lambda t: t.clone().requires_grad_(), a) if i in positions else a for i, a in enumerate(args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", samples(small=True), ids=str)
def test_opcheck(sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    """Schema, fake kernel, autograd registration and AOT dispatch, of the operator and of its backward."""
    given = sample.cast(dtype, device)
    with _Recorder() as recorder:
        given.gradients(ops)
    assert len(recorder.calls) >= 2, "forward and backward"
    for func, args in recorder.calls:
        backward = func.__name__.split(".")[0].endswith("_backward")
        if not backward:
            args = _asking(func, args, given)
        utils = (
            ("test_schema", "test_faketensor")
            if backward
            else ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        )
        # Older torch has no tolerances here; its own are float32's, too tight for bfloat16.
        limits = {"rtol": 1e-3, "atol": 1e-3} if "rtol" in inspect.signature(opcheck).parameters else {}
        opcheck(func, args, test_utils=utils, **limits)


@pytest.mark.parametrize("sample", samples(small=True), ids=str)
def test_one_differentiable_answer(sample: Sample, device: torch.device) -> None:
    """What an operator returns for backward takes part in no graph."""
    given = sample.cast(torch.float32, device)
    with _Recorder() as recorder:
        given.run(ops)
    func, args = recorder.calls[0]
    answer, *rest = out if isinstance(out := func(*_asking(func, args, given)), tuple) else (out,)
    assert all(t.requires_grad for t in tree_leaves(answer))
    assert not any(t.requires_grad for t in tree_leaves(rest))


@pytest.mark.parametrize("sample", samples(small=True), ids=str)
def test_compiled_autograd(sample: Sample, device: torch.device) -> None:
    """The graph's backward, recorded in eager mode, can be traced."""
    given = sample.cast(torch.float32, device)
    _, expected = given.gradients(ops)
    out = given.run(ops)
    upstream = given.upstream(out)
    torch._dynamo.reset()
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        out.backward(upstream)
    for name, grad in zip(given.leaves, expected):
        assert tolerances.error(given.arguments[name].grad, grad) <= 1e-6


@pytest.mark.parametrize("sample", [s for s in ALL if "rings" not in s.note and "5d" not in s.note], ids=str)
def test_compile_fullgraph(sample: Sample, device: torch.device) -> None:
    """One graph, no break; aot_eager on the CPU keeps it quick, inductor runs on the GPU."""
    given = sample.cast(torch.float32, device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    torch._dynamo.reset()
    names = list(given.leaves)
    fixed = {k: v for k, v in given.arguments.items() if k not in names}

    def call(*values: torch.Tensor) -> torch.Tensor:
        return sample.call(ops, sample.op, {**fixed, **dict(zip(names, values))}) * 2

    leaves = [given.arguments[n] for n in names]
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for _ in range(2):
        out, plain = compiled(*leaves), call(*leaves)
        assert tolerances.error(out, plain) <= 1e-6
        upstream = torch.ones_like(out)
        for a, b in zip(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(plain, leaves, upstream)):
            assert tolerances.error(a, b) <= 1e-6


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_same_bits_twice(sample: Sample, device: torch.device) -> None:
    """Determinism: run after run, and on the CPU for every number of threads."""
    given = sample.cast(torch.float32, device)
    first = given.gradients(ops)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = given.gradients(ops)
            if sample.op in LINEARS:  # the base product belongs to the vendor's library
                again_parts, first_parts = again[1][1:], first[1][1:]
            else:
                again_parts, first_parts = [again[0], *again[1]], [first[0], *first[1]]
            for a, b in zip(again_parts, first_parts):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_nothing_of_the_call_before(sample: Sample, device: torch.device) -> None:
    """The memory that a thread keeps from call to call brings nothing along: NaN in between changes no bit."""
    given, spoiled = sample.cast(torch.float32, device), sample.cast(torch.float32, device)
    for name in sample.leaves:
        spoiled.arguments[name] = torch.full_like(given.arguments[name], torch.nan, requires_grad=True)
    out, grads = given.gradients(ops)
    spoiled.gradients(ops)
    again, grads_again = given.gradients(ops)
    for before, after in zip([out, *grads], [again, *grads_again], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_only_what_asks(sample: Sample, device: torch.device) -> None:
    """Each leaf alone gets the same gradient, and no other tensor gets one."""
    given = sample.cast(torch.float32, device)
    _, together = given.gradients(ops)
    for name, expected in zip(sample.leaves, together):
        alone = given.cast(torch.float32, device)
        for other in sample.leaves:
            alone.arguments[other].requires_grad_(other == name)
        out = alone.run(ops)
        upstream = alone.upstream(out)
        (grad,) = torch.autograd.grad(out, [alone.arguments[name]], upstream)
        assert tolerances.error(grad, expected) <= 1e-6


@pytest.mark.parametrize("asks", [("weight",), ("bias",), ("x", "weight", "bias")], ids=str)
def test_unfrozen_base(asks: tuple[str, ...], device: torch.device) -> None:
    """A trainer that unfreezes the linear gets its gradients, with and without the others'."""
    sample = next(s for s in ALL if s.op == "expert_linear")
    given = replace(sample, leaves=asks).cast(torch.float32, device)
    out, grads = given.gradients(ops)
    _, expected = given.cast(torch.float64, device).gradients(reference, given.upstream(out))
    for name, grad, exact in zip(asks, grads, expected):
        assert tolerances.error(grad, exact) <= tolerances.linear_limit(torch.float32), name


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_no_grad(sample: Sample, device: torch.device) -> None:
    with torch.no_grad():
        out = sample.cast(torch.float32, device).run(ops)
    assert not out.requires_grad


@pytest.mark.parametrize("op", LINEARS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(op: str, dtype: torch.dtype, device: torch.device) -> None:
    """Under autocast a float32 call computes and returns the autocast dtype, float32 gradients stay float32."""
    sample = next(s for s in ALL if s.op == op).cast(torch.float32, device)
    if op == "expert_update":
        sample.arguments["base_out"] = sample.arguments["base_out"].detach().to(dtype)
        sample.leaves = LINEAR_LEAVES
    with torch.autocast(device.type, dtype=dtype):
        out, grads = sample.gradients(ops)
        energy = ops.band_energy(torch.randn(1, 2, 8, 8, device=device), Bands.dog(3))
    assert out.dtype == dtype
    assert energy.dtype == torch.float32
    ref, ref_grads = sample.cast(torch.float64, device).gradients(reference)
    assert tolerances.error(out, ref) <= tolerances.LOW[dtype]
    for name, got, exact in zip(sample.leaves, grads, ref_grads):
        assert got.dtype == torch.float32
        assert tolerances.error(got, exact) <= tolerances.LOW[dtype], name


def test_from_many_threads(device: torch.device) -> None:
    given = [s.cast(torch.float32, device) for s in ALL]
    expected = [s.gradients(ops) for s in given]
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else torch.no_grad()
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()
            with stream, torch.enable_grad():
                for i in range(len(given)):
                    sample, ref = given[(i + offset) % len(given)], expected[(i + offset) % len(given)]
                    out, grads = sample.gradients(ops)
                    for a, b in zip([out, *grads], [ref[0], *ref[1]]):
                        assert tolerances.error(a, b) <= 1e-6
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(5 * i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


@pytest.mark.gpu
@pytest.mark.parametrize("sample", ALL, ids=str)
def test_graph_capture(sample: Sample) -> None:
    """Forward and backward capture into one CUDA graph; a replay follows new inputs."""
    captured = Captured(sample.cast(torch.float32, torch.device("cuda")))
    with torch.no_grad():
        for leaf in captured.leaves:
            leaf.mul_(0.75)
    for got, expected in zip(captured.replay(), captured.eager()):
        assert tolerances.error(got, expected) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("sample", ALL, ids=str)
def test_current_stream(sample: Sample) -> None:
    """Work goes to the current stream and the host never waits: it is queued behind a long kernel there."""
    given = sample.cast(torch.float32, torch.device("cuda"))
    expected = given.gradients(ops)
    upstream = given.upstream(expected[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000_000)  # about a second
        out, grads = given.gradients(ops, upstream)
        assert not side.query(), "the operators must not wait for the device"
    side.synchronize()
    for a, b in zip([out, *grads], [expected[0], *expected[1]]):
        assert tolerances.error(a, b) <= 1e-6


def test_compile_several_definitions(device: torch.device) -> None:
    """Several definitions and sizes in one graph, built inside and outside it; no recompilation on reuse."""
    masks = torch.rand(2, 8, 5, generator=torch.Generator().manual_seed(3))
    masks[:, 1:, (0, -1)] = (masks[:, 1:, (0, -1)] + masks[:, 1:, (0, -1)].flip(1)) / 2
    custom = Bands.custom(masks)

    def call(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = ops.band_energy(z, Bands.dog(3)).sum() + ops.band_energy(z, Bands.author(3)).sum()
        return total + ops.band_energy(y, Bands.rings(2)).sum() + ops.band_energy(y, custom)[:, 1].sum()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        z = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(seed)).to(device)
        y = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
        with torch.compiler.set_stance("fail_on_recompile") if seed else torch.compiler.set_stance("default"):
            assert tolerances.error(compiled(z, y), call(z, y)) <= 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sample", ALL, ids=str)
def test_under_checkpoint(sample: Sample, reentrant: bool, device: torch.device) -> None:
    """Recomputed in backward, every operator gives the gradients it gives otherwise."""
    given = sample.cast(torch.float32, device)
    _, expected = given.gradients(ops)
    leaves = [given.arguments[n] for n in given.leaves]

    def call(*values: torch.Tensor) -> torch.Tensor:
        return sample.call(ops, sample.op, {**given.arguments, **dict(zip(given.leaves, values))})

    out = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=reentrant)
    out.backward(given.upstream(out))
    for leaf, grad in zip(leaves, expected):
        assert tolerances.error(leaf.grad, grad) <= 1e-6


@pytest.mark.parametrize("sample", samples(small=True), ids=str)
def test_saved_is_read_once(sample: Sample, device: torch.device) -> None:
    """Under checkpointing each reading asks for the recomputation."""
    given = sample.cast(torch.float32, device)
    kept, read = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t), len(kept) - 1)[1], lambda i: (read.append(i), kept[i])[1]
    ):
        given.gradients(ops)
    assert sorted(read) == list(range(len(kept)))


@pytest.mark.parametrize("sample", samples(small=True), ids=str)
def test_second_backward_is_an_error(sample: Sample, device: torch.device) -> None:
    given = sample.cast(torch.float64, device)
    leaf = given.arguments["gate" if "gate" in given.leaves else given.leaves[0]]
    out = given.run(ops)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        grad.square().sum().backward()


@pytest.mark.parametrize("sample", [s for s in ALL if s.note in ("dog", "author", "r12")], ids=str)
def test_backward_fills_nothing(sample: Sample, device: torch.device) -> None:
    """Outputs that have no gradient get None in backward, not zeros: each would be a launch on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    given = sample.cast(torch.float32, device)
    out = given.run(ops)
    upstream, leaves = given.upstream(out), [given.arguments[n] for n in given.leaves]
    with profile(activities=[ProfilerActivity.CPU]) as session:
        torch.autograd.grad(out, leaves, upstream)
    called = {e.name for e in session.events()}
    assert any(name.startswith("fera_ext::") for name in called)
    assert not called & {"aten::zeros", "aten::zero_", "aten::fill_"}


class _NoGradient(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_no_upstream_gradient(sample: Sample, device: torch.device) -> None:
    """A function downstream that gives no gradient: the leaves get none, or zeros."""
    given = sample.cast(torch.float32, device)
    leaves = [given.arguments[n] for n in given.leaves]
    grads = torch.autograd.grad(_NoGradient.apply(given.run(ops)).sum(), leaves, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)
