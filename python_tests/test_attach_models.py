"""Every architecture: the gate comes from its latent, and every sample is treated as if alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers_models import CASES, Plain, flux, image_ids, latents, pack, plain, randomise
from torch import Tensor, nn

from fera_ext import architectures
from fera_ext.adapter import attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig

# Rings tell small latents apart; the default bands see them all as low frequencies.
CONFIG = FeraConfig(target_modules=["to_q", "to_out.0"], bands=Bands.rings(3))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_architecture(name: str) -> None:
    case = CASES[name](3)
    want, keys = case.run(), list(case.model.state_dict())
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    on = case.run()
    gate = adapter.gate
    assert gate is not None
    assert gate.shape == (3, 3)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, adapter.router.from_latent(case.latent, CONFIG.bands))
    # The samples' gates differ, so a row that took its neighbour's would show below.
    assert float((gate[0] - gate[1]).abs().max()) > 0.02
    assert float((on - want).abs().max()) > 1e-3
    torch.testing.assert_close(case.run_one_by_one(), on, rtol=1e-4, atol=1e-5)
    with adapter.disabled():
        assert torch.equal(case.run(), want)
    adapter.detach()
    assert torch.equal(case.run(), want)
    assert list(case.model.state_dict()) == keys


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_the_router(name: str) -> None:
    case = CASES[name]()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    case.run().square().mean().backward()
    for parameter_name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.any()), parameter_name
    assert all(p.grad is None for n, p in case.model.named_parameters() if "lora" not in n and "fera" not in n)


@torch.no_grad()
def test_every_linear_of_the_video_model_is_batch_major() -> None:
    """Temporal blocks, positions, cross-attention context: B*F and B*H*W rows, each sample's together."""
    case = CASES["svd"](3)
    targets = r".*\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out|linear_\d|time_emb_proj)"
    adapter = attach(case.model, CONFIG.override(target_modules=targets))
    randomise(adapter)
    rows = set()
    for layer in adapter.layers.values():
        layer.register_forward_pre_hook(lambda m, a: rows.add(a[0].shape[0]))
    on = case.run()
    assert {3, 3 * 3, 3 * 8 * 8} <= rows
    torch.testing.assert_close(case.run_one_by_one(), on, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positional_and_keyword_latents() -> None:
    case = CASES["sd15"]()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = case.run()
    values = list(case.inputs.values())
    assert torch.equal(case.model(*values).sample, want)
    assert torch.equal(case.model(*values, return_dict=False)[0], want)


# FLUX's packed tokens.


@torch.no_grad()
def test_flux_position_ids_are_read_once() -> None:
    case = flux()
    adapter = attach(case.model, CONFIG)
    ids, reads = case.inputs["img_ids"], []
    size = adapter._routing.size
    real = torch.Tensor.cpu

    def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reads.append(self)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", cpu)
        size.from_ids(ids), size.from_ids(ids)
        assert len(reads) == 1
        ids.add_(0)
        size.from_ids(ids)
        assert len(reads) == 2
        size.from_ids(ids.clone())
        assert len(reads) == 3
        with torch.inference_mode():
            frozen = ids.clone()
            size.from_ids(frozen), size.from_ids(frozen)
        assert len(reads) == 5


@torch.no_grad()
def test_flux_reference_images_are_not_the_latent() -> None:
    case = flux()
    adapter = attach(case.model, CONFIG)
    reference = pack(latents(2, 4, 8, 8, seed=7))
    case.run(
        hidden_states=torch.cat([case.inputs["hidden_states"], reference], 1),
        img_ids=torch.cat([case.inputs["img_ids"], image_ids(8, 8, first=1)]),
    )
    torch.testing.assert_close(adapter.gate, adapter.router.from_latent(case.latent, CONFIG.bands))


@torch.no_grad()
def test_flux_latent_size() -> None:
    case = flux()
    adapter = attach(case.model, CONFIG)
    assert adapter.latent_size is None
    case.run()
    gate = adapter.gate
    adapter.latent_size = (12, 20)
    case.run()
    torch.testing.assert_close(adapter.gate, gate)
    case.run(img_ids=case.inputs["img_ids"][None])
    adapter.latent_size = (12, 40)
    with pytest.raises(ValueError, match=r"latent: adapter.latent_size must give .* 60 tokens, got 6 \* 20"):
        case.run()
    adapter.latent_size = None
    case.run(img_ids=case.inputs["img_ids"][None])
    torch.testing.assert_close(adapter.gate, gate)
    with pytest.raises(ValueError, match="FeraAdapter: latent_size must be"):
        adapter.latent_size = (0, 4)  # type: ignore[assignment]


@torch.no_grad()
def test_flux_errors() -> None:
    case = flux()
    attach(case.model, CONFIG)
    with pytest.raises(ValueError, match=r"latent: img_ids must give a height \* width of the 60 tokens"):
        case.run(img_ids=image_ids(12, 20)[:-3])
    with pytest.raises(ValueError, match=r"latent: img_ids must be \(T, 3\), got NoneType"):
        case.run(img_ids=None)
    with pytest.raises(ValueError, match=r"latent: hidden_states must be \(B, T, 4C\) packed tokens"):
        case.run(hidden_states=case.latent)


@torch.no_grad()
def test_flux_compiled_with_its_latent_size() -> None:
    case = flux()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = case.run()
    adapter.latent_size = (12, 20)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**case.inputs).sample, want)


def test_latent_size_copies_and_pickles() -> None:
    size = architectures.LatentSize()
    size.from_ids(image_ids(4, 4))
    size.given = (4, 4)
    assert copy.deepcopy(size).given == pickle.loads(pickle.dumps(size)).given == (4, 4)


# Models of one's own.


class Child(Plain):
    """A subclass of a class in the table is read as its parent."""


class Odd(nn.Module):
    """The latent is not the first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Plain()

    def forward(self, t: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"out": self.inner(z)}


def test_lookup_by_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(args: Any, kwargs: Any, size: Any) -> Tensor:
        return args[0] * 100

    monkeypatch.setitem(architectures.ARCHITECTURES, "Plain", scaled)
    assert architectures.extractor(Child()) is scaled


@torch.no_grad()
def test_own_latent_function() -> None:
    model = Odd()
    adapter = attach(model, CONFIG, latent=lambda args, kwargs, size: kwargs["z"])
    z = latents(2, 4, 8, 8)
    model(t=torch.zeros(2), z=z)
    torch.testing.assert_close(adapter.gate, adapter.router.from_latent(z, CONFIG.bands))


@pytest.mark.parametrize(
    ("args", "got"),
    [
        ((torch.zeros(2), torch.zeros(2, 4, 8, 8)), r"got \(2,\) float32"),
        ((torch.zeros(2, 4, 8, 8, dtype=torch.int64), None), r"got \(2, 4, 8, 8\) int64"),
        ((torch.zeros(0, 4, 8, 8), None), r"got \(0, 4, 8, 8\) float32"),
        ((None, None), "got NoneType"),
    ],
)
def test_no_latent_where_it_should_be(args: tuple[Any, ...], got: str) -> None:
    model = Odd()
    attach(model, CONFIG)
    with pytest.raises(ValueError, match=r"latent: the first argument of Odd must be a floating .*" + got):
        model(*args)


@torch.no_grad()
def test_five_axes_and_rings() -> None:
    case = plain()
    adapter = attach(case.model, FeraConfig(target_modules=["to_q"], bands=Bands.rings(4), num_experts=5))
    case.run()
    assert adapter.gate is not None
    assert adapter.gate.shape == (2, 5)
    torch.testing.assert_close(adapter.gate, adapter.router.from_latent(case.latent, Bands.rings(4)))
