"""The model level on each device: the twins' answers, bfloat16, checkpointing, a captured step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import helpers_models as models
import pytest
import torch
from tolerances import MODEL_F32, MODEL_GRAD_F32, MODEL_GRAD_FLOOR, error

from fera_ext import Bands, FeraConfig, attach, ops, reference

CASES = [
    models.sd15,
    models.sdxl,
    models.svd,
    models.sd3,
    models.flux,
    models.dit,
    models.pixart,
    models.plain,
]

# Rings tell small latents apart; the default bands see them all as low frequencies.
BANDS = Bands.rings(3)


def _move(case: models.Case, device: torch.device, dtype: torch.dtype = torch.float32) -> models.Case:
    def to(value):
        if isinstance(value, dict):
            return {k: to(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return models.Case(copy.deepcopy(case.model).to(device, dtype), to(case.inputs), case.batched, to(case.latent))


def _attach(case: models.Case):
    """Attaches; the adapter's numbers are drawn on the CPU, the same at every call.

    The last bias of the router centres its logits, so that no expert takes it all and the samples' gates differ.
    """
    torch.manual_seed(0)
    adapter = attach(case.model, FeraConfig(bands=BANDS))
    models.randomise(adapter)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith(("lora_A", "w1")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif name.endswith("w2"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        router = adapter.router
        w1, b1, w2 = (p.double().cpu() for p in (router.w1, router.b1, router.w2))
        energy = reference.frequency_energy(case.latent.double().cpu(), BANDS)
        router.b2.copy_(-(torch.relu(energy @ w1.T + b1) @ w2.T).mean(0))
    return adapter


def _gates_differ(adapter) -> bool:
    """Whether a sample that took its neighbour's gate would show."""
    return float((adapter.gate[0] - adapter.gate[1]).detach().abs().max()) > 0.05


def _grads(case: models.Case, adapter) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = case.run()
    with torch.no_grad(), adapter.disabled():
        base = case.run()
    loss = out.float().square().mean()
    if out.dim() >= 4:
        loss = loss + adapter.fecl_loss(base, out, torch.zeros_like(out))
    return out.detach(), list(torch.autograd.grad(loss, list(adapter.parameters())))


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_gives_the_twins_answers(
    make: Callable[[], models.Case], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same model on the same device with the plain PyTorch twins in the operators' place."""
    case, twin = _move(make(), device), _move(make(), device)
    adapter = _attach(case)
    out, grads = _grads(case, adapter)
    assert _gates_differ(adapter)
    for name in ops.__all__:
        monkeypatch.setattr(ops, name, getattr(reference, name))
    twin_out, twin_grads = _grads(twin, _attach(twin))
    assert error(out, twin_out) <= MODEL_F32
    for a, b in zip(grads, twin_grads):
        assert (a - b).norm() <= MODEL_GRAD_F32 * b.norm() + MODEL_GRAD_FLOOR


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_bfloat16_trains(make: Callable[[], models.Case], device: torch.device) -> None:
    if make is models.flux and device.type == "cuda":
        pytest.skip("the tiny random FLUX has NaN gradients in bfloat16 on a GPU with plain PyTorch twins too")
    case = _move(make(), device, torch.bfloat16)
    adapter = _attach(case)
    out, grads = _grads(case, adapter)
    _, again = _grads(case, adapter)
    assert out.dtype == torch.bfloat16
    assert adapter.gate.dtype == torch.float32
    for parameter, grad, twice in zip(adapter.parameters(), grads, again):
        assert grad.dtype == parameter.dtype
        assert torch.isfinite(grad).all()
        assert (grad - twice).norm() <= 2e-2 * grad.norm()  # the base's own kernels may use atomics


def test_gradient_checkpointing(device: torch.device) -> None:
    plain, checkpointed = _move(models.sd15(), device), _move(models.sd15(), device)
    checkpointed.model.enable_gradient_checkpointing()
    plain.model.train()
    checkpointed.model.train()
    _, expected = _grads(plain, _attach(plain))
    _, grads = _grads(checkpointed, _attach(checkpointed))
    for a, b in zip(grads, expected):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8


@pytest.mark.gpu
def test_step_captures_into_a_graph() -> None:
    """Forward, FECL's base pass and backward, gate included, in one CUDA graph."""
    case = _move(models.sd15(), torch.device("cuda"))
    adapter = _attach(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            _grads(case, adapter)
    torch.cuda.current_stream().wait_stream(side)
    assert _gates_differ(adapter)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grads = _grads(case, adapter)
    case.inputs["sample"].mul_(0.5)
    graph.replay()
    captured = [out.clone(), *(g.clone() for g in grads)]
    eager_out, eager_grads = _grads(case, adapter)
    for a, b in zip(captured, [eager_out, *eager_grads]):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-8
