"""What attached models refuse, what their gates are blind to, and what they survive: pickling, autocast."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import Case, Plain, inpainting, latents, plain, randomise, sd3, sd15, svd, unet2d
from torch import Tensor, nn

from fera_ext import architectures, ops
from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig

BANDS = Bands.rings(3)
CONFIG = FeraConfig(target_modules=["to_q", "to_out.0"], bands=BANDS)
FEED_FORWARD = FeraConfig(target_modules=["ff.net.2"], bands=BANDS)


def _attached(case: Case, config: FeraConfig = CONFIG) -> FeraAdapter:
    adapter = attach(case.model, config)
    randomise(adapter)
    return adapter


# The README's loop.


def test_training_loop_under_autocast() -> None:
    """bfloat16 predictions, float32 target and masters."""
    case = sd15()
    adapter = _attached(case)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    target = torch.randn_like(case.latent)
    before = [p.detach().clone() for p in adapter.parameters()]
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pred = case.run()
            with torch.no_grad(), adapter.disabled():
                base = case.run()
            assert pred.dtype == base.dtype == torch.bfloat16
            fecl = adapter.fecl_loss(base, pred, target)
            loss = nn.functional.mse_loss(pred, target) + fecl
        assert fecl.dtype == torch.float32
        torch.testing.assert_close(
            fecl, adapter.config.fecl_weight * ops.fecl_loss(base.float(), pred.float(), target, BANDS)
        )
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapter.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(p, q) for p, q in zip(adapter.parameters(), before))


@pytest.mark.parametrize("which", range(3))
def test_fecl_is_double_if_any_is(which: int) -> None:
    adapter = attach(Plain(), CONFIG)
    tensors = [*torch.randn(3, 2, 4, 8, 8).unbind()]
    tensors[which] = tensors[which].double()
    assert adapter.fecl_loss(*tensors).dtype == torch.float64
    assert adapter.fecl_loss(*(t.half() for t in tensors)).dtype == torch.float32


# Conditioning channels.


@pytest.mark.parametrize("make", [inpainting, svd], ids=lambda f: f.__name__)
@torch.no_grad()
def test_conditioning_channels_do_not_move_the_gate(make: Any) -> None:
    case = make()
    adapter = _attached(case)
    out, gate = case.run(), adapter.gate
    noisy = case.latent
    other = case.inputs["sample"].clone()
    axis = noisy.ndim - 3
    other.narrow(axis, 4, other.shape[axis] - 4).copy_(
        latents(*other.shape, seed=9).flip(0).narrow(axis, 0, other.shape[axis] - 4)
    )
    assert not torch.equal(case.run(sample=other), out)
    assert torch.equal(adapter.gate, gate)
    router = adapter.router
    by_hand = ops.latent_gate(noisy.contiguous(), BANDS, router.w1, router.b1, router.w2, router.b2, router.tau)
    torch.testing.assert_close(gate, by_hand)
    whole = ops.latent_gate(other, BANDS, router.w1, router.b1, router.w2, router.b2, router.tau)
    assert float((whole - gate).abs().max()) > 0.02
    positional = {k: v for k, v in case.inputs.items() if k != "sample"}
    case.model(other, **positional)
    assert torch.equal(adapter.gate, gate)


@pytest.mark.slow
def test_conditioning_channels_compile_as_one_graph() -> None:
    case = inpainting()
    adapter = _attached(case)
    want = case.run()
    torch._dynamo.reset()
    got = torch.compile(case.model, fullgraph=True, backend="aot_eager")(**case.inputs).sample
    torch.testing.assert_close(got, want)
    got.square().mean().backward()
    assert bool(adapter.router.w2.grad.any())


def test_which_channels() -> None:
    assert architectures.extractor(sd15().model) == architectures.NoisyChannels("sample")
    assert architectures.extractor(unet2d().model) == architectures.NoisyChannels("sample")
    assert architectures.extractor(svd().model) == architectures.NoisyChannels("sample", 4)
    entry = architectures.extractor(inpainting().model)
    assert entry == architectures.NoisyChannels("sample", 4)
    assert architectures.NoisyChannels("sample").of(nn.Identity()).channels is None
    size = architectures.LatentSize()
    assert entry((), {}, size) is None
    tokens = torch.zeros(2, 9, 3)
    assert entry((tokens,), {}, size) is tokens


# Layouts in which a row's gate is lost.


def _chunk(model: nn.Module, size: int | None, dim: int) -> None:
    for module in model.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(size, dim=dim)


@torch.no_grad()
def test_feed_forward_chunks_of_the_batch_are_refused() -> None:
    """Two of the video's six frames at a time would take the gates of other samples."""
    case = svd()
    adapter = _attached(case, FEED_FORWARD)
    want = case.run()
    case.model.enable_forward_chunking(chunk_size=2, dim=0)
    with pytest.raises(RuntimeError, match=r"feed-forward chunking must not be along the batch .* chunk_size=2, dim=0"):
        case.run()
    _chunk(case.model, 1, 0)
    torch.testing.assert_close(case.run_one_by_one(), want, rtol=1e-4, atol=1e-5)
    with adapter.disabled():
        case.run()
    _chunk(case.model, 1, 1)
    torch.testing.assert_close(case.run(), want, rtol=1e-4, atol=1e-5)
    _chunk(case.model, None, 0)
    assert torch.equal(case.run(), want)


@torch.no_grad()
def test_feed_forward_chunks_do_not_concern_adapted_attention() -> None:
    case = sd15(4)
    _attached(case)
    want = case.run()
    _chunk(case.model, 2, 0)
    torch.testing.assert_close(case.run(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [sd15, sd3], ids=lambda f: f.__name__)
@torch.no_grad()
def test_fused_projections_are_refused(make: Any) -> None:
    case = make()
    adapter = _attached(case)
    want = case.run()
    case.model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"projections must be separate .* got \S*attn\S* with fused ones"):
        case.run()
    with adapter.disabled():
        case.run()
    # unfuse_qkv_projections leaves the modules' flags on.
    case.model.unfuse_qkv_projections()
    assert torch.equal(case.run(), want)


@torch.no_grad()
def test_fused_projections_of_attentions_with_a_flag_of_their_own() -> None:
    from helpers_models import flux

    case = flux()
    _attached(case)
    want = case.run()
    case.model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="projections must be separate"):
        case.run()
    case.model.unfuse_qkv_projections()
    assert torch.equal(case.run(), want)


@torch.no_grad()
def test_fused_projections_do_not_concern_other_layers() -> None:
    case = sd15()
    adapter = _attached(case, FeraConfig(target_modules=["to_out.0"], bands=BANDS))
    want = case.run()
    case.model.fuse_qkv_projections()
    torch.testing.assert_close(case.run(), want, rtol=1e-4, atol=1e-5)
    adapter.detach()
    fused = attach(case.model, FeraConfig(target_modules=["to_qkv"], bands=BANDS))
    randomise(fused)
    assert not torch.equal(case.run(), want)


# Wrappers.


_Sharded = type("FSDPLinear", (type("FSDPModule", (), {}), nn.Linear), {})  # type: ignore[misc]


def test_wrappers_are_refused() -> None:
    from torch.nn.parallel import DataParallel

    text = "attach: model must be the denoiser itself without wrappers .* got "
    with pytest.raises(TypeError, match=text + "DataParallel"):
        attach(DataParallel(Plain()), CONFIG)
    with pytest.raises(TypeError, match=text + "DataParallel"):
        attach(nn.Sequential(DataParallel(Plain())), CONFIG)
    model = Plain()
    model.blocks[0].to_q = _Sharded(16, 16)
    with pytest.raises(TypeError, match=text + "FSDPLinear"):
        attach(model, CONFIG)


def test_fully_sharded_models_are_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(Plain(), device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match="got FullyShardedDataParallel"):
            attach(model, CONFIG)
    finally:
        torch.distributed.destroy_process_group()


def test_a_replica_is_refused() -> None:
    case = plain()
    _attached(case)
    want = case.run()
    replica = case.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"got a torch.nn.DataParallel replica of Plain"):
        replica(case.latent)
    assert torch.equal(case.run(), want)


# Files.


@pytest.mark.parametrize("make", [plain, inpainting, sd3], ids=lambda f: f.__name__)
@torch.no_grad()
def test_an_attached_model_pickles(make: Any) -> None:
    case = make()
    adapter = _attached(case)
    want = case.run()
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for parameter in adapter.parameters():
        parameter.zero_()
    assert torch.equal(Case(loaded, case.inputs, case.batched, case.latent).run(), want)


def test_saving_an_attached_model_is_refused(tmp_path: Path) -> None:
    case = sd15()
    adapter = _attached(case)
    text = r"save_pretrained: model must be without an adapter, .*adapter.detach\(\).*adapter.save"
    with pytest.raises(RuntimeError, match=text):
        case.model.save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match=text):
        copy.deepcopy(case.model).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    adapter.detach()
    assert "save_pretrained" not in vars(case.model)
    case.model.save_pretrained(tmp_path / "model")
    loaded = type(case.model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in case.model.state_dict().items())


def test_detach_gives_back_the_instance_s_own_save_pretrained() -> None:
    def own(path: str) -> str:
        return path

    model: Any = Plain()
    model.save_pretrained = own
    adapter = attach(model, CONFIG)
    with pytest.raises(RuntimeError, match="save_pretrained: model must be without an adapter"):
        model.save_pretrained("here")
    adapter.detach()
    assert model.save_pretrained is own
    plain_model = Plain()
    attach(plain_model, CONFIG)
    assert not hasattr(plain_model, "save_pretrained")


def test_saving_a_pipeline_is_refused(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    case = unet2d()
    pipe = DDPMPipeline(case.model, DDPMScheduler())
    adapter = _attached(case)
    with pytest.raises(RuntimeError, match="save_pretrained: model must be without an adapter"):
        pipe.save_pretrained(tmp_path)
    adapter.detach()
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    case.model.eval()  # as a loaded model is: on some CPUs training takes other kernels
    out: Tensor = again.unet(**case.inputs).sample
    assert torch.equal(out, case.run())
