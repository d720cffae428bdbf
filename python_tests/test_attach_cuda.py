"""The model level on a GPU: the CPU's answers, bfloat16, checkpointing, a captured step, same bits twice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import helpers_models as models
import pytest
import torch

from fera_ext import FeraConfig, attach

CASES = [models.sd15, models.sdxl, models.svd, models.sd3, models.flux, models.dit, models.pixart, models.plain]
pytestmark = pytest.mark.gpu


def _move(case: models.Case, dtype: torch.dtype = torch.float32) -> models.Case:
    def to(value):
        if isinstance(value, dict):
            return {k: to(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("cuda", dtype if value.is_floating_point() else value.dtype)

    return models.Case(copy.deepcopy(case.model).to("cuda", dtype), to(case.inputs), case.batched, to(case.latent))


def _attach(case: models.Case):
    adapter = attach(case.model, FeraConfig())
    models.randomise(adapter)
    return adapter


def _grads(case: models.Case, adapter) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = case.run()
    with torch.no_grad(), adapter.disabled():
        base = case.run()
    loss = out.float().square().mean()
    if out.dim() >= 4:
        loss = loss + adapter.fecl_loss(base, out, torch.zeros_like(out))
    return out.detach(), list(torch.autograd.grad(loss, list(adapter.parameters())))


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_gives_the_cpu_answers(make: Callable[[], models.Case]) -> None:
    case = make()
    on_gpu = _move(case)
    out, grads = _grads(case, _attach(case))
    gpu_out, gpu_grads = _grads(on_gpu, _attach(on_gpu))
    torch.testing.assert_close(gpu_out.cpu(), out, rtol=1e-3, atol=1e-4)
    for a, b in zip(gpu_grads, grads):
        assert (a.cpu() - b).norm() <= 2e-3 * b.norm() + 1e-7


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_bfloat16_trains(make: Callable[[], models.Case]) -> None:
    case = _move(make(), torch.bfloat16)
    adapter = _attach(case)
    out, grads = _grads(case, adapter)
    assert out.dtype == torch.bfloat16
    assert adapter.gate.dtype == torch.float32
    for parameter, grad in zip(adapter.parameters(), grads):
        assert grad.dtype == parameter.dtype
        assert torch.isfinite(grad).all()


def test_gradient_checkpointing() -> None:
    plain, checkpointed = _move(models.sd15()), _move(models.sd15())
    checkpointed.model.enable_gradient_checkpointing()
    plain.model.train()
    checkpointed.model.train()
    _, expected = _grads(plain, _attach(plain))
    _, grads = _grads(checkpointed, _attach(checkpointed))
    for a, b in zip(grads, expected):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8


def test_step_captures_into_a_graph() -> None:
    """Forward, FECL's base pass and backward, gate included, in one CUDA graph."""
    case = _move(models.sd15())
    adapter = _attach(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _grads(case, adapter)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = _grads(case, adapter)
    case.inputs["sample"].mul_(0.5)
    graph.replay()
    captured = [out.clone(), *(g.clone() for g in grads)]
    eager_out, eager_grads = _grads(case, adapter)
    for a, b in zip(captured, [eager_out, *eager_grads]):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8
