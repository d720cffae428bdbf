"""Adapter files: ours and the published code's, strict both, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers_models import Block, Plain, plain, randomise
from safetensors import safe_open
from torch import Tensor, nn

import fera_ext
from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.checkpoint import FILE_NAME, AdapterFileError, load_adapter
from fera_ext.config import FeraConfig

GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIG = FeraConfig(target_modules=["to_q", "to_out.0"], bands=Bands.rings(3), lora_alpha=3.0)


def _saved(folder: Path, config: FeraConfig = CONFIG) -> tuple[Path, Tensor]:
    """A random adapter of the plain model on disk, and its output."""
    case = plain()
    adapter = attach(case.model, config)
    randomise(adapter)
    return Path(adapter.save(folder / "a.safetensors")), case.run()


def _rewrite(
    file: Path,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda t: None,
    metadata: Callable[[dict[str, str]], Any] = lambda m: None,
) -> Path:
    """A copy of the file with its tensors or its metadata changed in place."""
    with safe_open(file, framework="pt") as stream:
        data = stream.metadata()
        values = {k: stream.get_tensor(k) for k in stream.keys()}  # noqa: SIM118
    tensors(values)
    metadata(data)
    target = file.with_name("changed.safetensors")
    safetensors.torch.save_file(values, target, data)
    return target


def _refused(model: nn.Module, file: Path, text: str, **options: Any) -> None:
    """Loading fails with this text, and the model is as it was."""
    flags = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=text) as caught:
        load_adapter(model, file, **options)
    assert str(caught.value).startswith("load_adapter: ")
    assert "got" in str(caught.value)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


# Ours.


@pytest.mark.parametrize("form", ["file", "directory"])
def test_round_trip(tmp_path: Path, form: str) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want, state = case.run(), {k: v.clone() for k, v in adapter.state_dict().items()}
    target = tmp_path / "deep" / ("x.safetensors" if form == "file" else "folder")
    written = adapter.save(target)
    assert Path(written) == (target if form == "file" else target / FILE_NAME)
    adapter.detach()
    again = load_adapter(case.model, target)
    assert again.config == CONFIG
    assert again.matched == adapter.matched
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    assert torch.equal(case.run(), want)


def test_metadata_says_what_the_file_is(tmp_path: Path) -> None:
    file, _ = _saved(tmp_path)
    with safe_open(file, framework="pt") as stream:
        data = stream.metadata()
    assert data["format"] == "fera_ext"
    assert data["format_version"] == "1"
    assert data["library_version"] == fera_ext.__version__
    assert data["base_model_class"] == "Plain"
    assert json.loads(data["bands"]) == {"name": "rings", "K": 3}
    assert json.loads(data["config"])["lora_alpha"] == 3.0
    assert json.loads(data["layers"])[:2] == ["blocks.0.to_q", "blocks.0.to_out.0"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG, dtype=dtype)
    randomise(adapter)
    if dtype == torch.float64:
        case.model.double()
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    adapter.save(tmp_path)
    adapter.detach()
    again = load_adapter(case.model, tmp_path)
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    again.detach()
    wide = load_adapter(case.model, tmp_path, dtype=torch.float32)
    assert all(p.dtype == torch.float32 for n, p in wide.named_parameters() if n.startswith("layers"))


def test_custom_bands_travel_as_a_tensor(tmp_path: Path) -> None:
    masks = torch.stack([Bands.rings(3).filters(8, 12, torch.device("cpu"), torch.float64).table[k] for k in (0, 2)])
    config = CONFIG.override(bands=Bands.custom(masks))
    file, want = _saved(tmp_path, config)
    case = plain()
    adapter = load_adapter(case.model, file)
    assert adapter.config == config
    assert torch.equal(case.run(), want)
    adapter.detach()
    _refused(case.model, _rewrite(file, lambda t: t.pop("bands.masks")), "masks must be given")
    _refused(case.model, _rewrite(file, lambda t: t["bands.masks"].mul_(2)), "another sha256")
    _refused(case.model, _rewrite(file, lambda t: t.update(extra=torch.zeros(1))), "unknown extra")


def test_stacked_layers_of_a_shared_linear(tmp_path: Path) -> None:
    def shared() -> Plain:
        torch.manual_seed(0)
        model = Plain()
        model.blocks[1].to_q = model.blocks[0].to_q
        return model

    z = plain().latent
    model = shared()
    adapter = attach(model, CONFIG)
    randomise(adapter)
    want = model(z)
    adapter.save(tmp_path)
    twin = shared()
    load_adapter(twin, tmp_path)
    assert torch.equal(twin(z), want)


def test_overrides(tmp_path: Path) -> None:
    file, want = _saved(tmp_path)
    case = plain()
    adapter = load_adapter(case.model, file, lora_alpha=6.0, lora_dropout=0.1, fecl_weight=1.0)
    assert adapter.config.lora_alpha == 6.0
    assert not torch.equal(case.run(), want)
    adapter.detach()
    _refused(case.model, file, "fields must be among .* got alpha", alpha=2.0)
    _refused(case.model, file, r"lora_A must be of shape \(3, 8, 16\), got \(3, 4, 16\)", rank=8)
    _refused(case.model, file, r"router.w1 must be of shape \(64, 4\)", bands=Bands.rings(4))
    _refused(case.model, file, "only in the file: .*to_out.0", target_modules=["to_q"])


def test_base_model_class(tmp_path: Path) -> None:
    file, want = _saved(tmp_path)

    class Other(Plain):
        pass

    torch.manual_seed(0)
    model = Other()
    _refused(model, file, "base model class must be Plain, got Other")
    load_adapter(model, file, check_base_class=False)
    assert torch.equal(model(plain().latent), want)


def test_model_with_other_layers(tmp_path: Path) -> None:
    file, _ = _saved(tmp_path)
    _refused(Plain(blocks=2), file, "none at blocks.2.to_q, blocks.2.to_out.0")
    _refused(Plain(blocks=4), file, "only in the model: blocks.3.to_out.0, blocks.3.to_q")
    _refused(Plain(width=8), file, r"blocks.0.to_q.lora_A must be of shape \(3, 4, 8\), got \(3, 4, 16\)")
    model = Plain()
    model.blocks[1].to_q = nn.Identity()
    _refused(model, file, "blocks.1.to_q must be a linear layer")


@pytest.mark.parametrize("size", [0, 4, 40, 700, -1, -100])
def test_truncated(tmp_path: Path, size: int) -> None:
    file, _ = _saved(tmp_path)
    file.write_bytes(file.read_bytes()[:size])
    _refused(Plain(), file, "file must be complete and in safetensors format")


KEY = "layers.blocks.1.to_q.lora_B"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(KEY), f"missing {KEY}"),
        (lambda t: t.pop("router.b2"), "missing router.b2"),
        (lambda t: t.update({"layers.x.lora_A": t[KEY].clone()}), "unknown layers.x.lora_A"),
        (lambda t: t.update({KEY: t[KEY][:, :2].clone()}), rf"{KEY} must be of shape \(16, 3, 4\)"),
        (
            lambda t: t.update({KEY: t[KEY].double()}),
            f"{KEY} must be torch.float32, got torch.float64",
        ),
        (
            lambda t: t.update({k: v.int() for k, v in t.items() if "lora" in k}),
            "experts must be one of",
        ),
        (
            lambda t: t.update({k: v.half() for k, v in t.items() if "router" in k}),
            "router must be one of",
        ),
        (lambda t: t.update({"bands.masks": t[KEY].clone()}), "unknown bands.masks"),
        (lambda t: t.clear(), "missing layers.blocks.0.to_out.0.lora_A.* and 8 more"),
    ],
)
def test_partly_matching(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], text: str) -> None:
    file, _ = _saved(tmp_path)
    _refused(Plain(), _rewrite(file, change), text)


def _config(**changes: Any) -> Callable[[dict[str, str]], None]:
    def change(data: dict[str, str]) -> None:
        data["config"] = json.dumps({**json.loads(data["config"]), **changes})

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.clear(), "must be an adapter written by fera_ext"),
        (lambda m: m.update(format="other"), "must be an adapter written by fera_ext"),
        (
            lambda m: m.update(format_version="2"),
            r"format_version must be 1, got 2 \(written by fera_ext",
        ),
        (lambda m: m.pop("layers"), "metadata must hold .* got none of layers"),
        (lambda m: m.update(config="{"), "metadata must be JSON"),
        (lambda m: m.update(config="[]"), "config must hold bands"),
        (lambda m: m.update(layers="{}"), "layers must be a list of paths"),
        (lambda m: m.update(layers="[1]"), "layers must be a list of paths"),
        (_config(rank=-1), "rank must be an integer"),
        (_config(surprise=1), "unknown surprise"),
        (_config(bands={"name": "wavelets", "K": 3}), "name must be one of"),
        (_config(target_modules=["to_q"]), "only in the file"),
    ],
)
def test_foreign_metadata(tmp_path: Path, change: Callable[[dict[str, str]], Any], text: str) -> None:
    file, _ = _saved(tmp_path)
    _refused(Plain(), _rewrite(file, metadata=change), text)


def test_the_base_model_itself_is_no_adapter(tmp_path: Path) -> None:
    safetensors.torch.save_file(Plain().state_dict(), tmp_path / "model.safetensors")
    _refused(
        Plain(),
        tmp_path / "model.safetensors",
        "got .*model.safetensors with keys blocks.0.to_out.0.bias",
    )


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors", tmp_path / "none.pt"):
        with pytest.raises(FileNotFoundError, match="load_adapter: path must be an adapter file or its dir"):
            load_adapter(Plain(), path)


def test_attached_model_is_refused_first(tmp_path: Path) -> None:
    file, _ = _saved(tmp_path)
    model = Plain()
    adapter = attach(model, CONFIG)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    with pytest.raises(ValueError, match="must have no adapter"):
        load_adapter(model, file)
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())


# Atomic.


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    file, _want = _saved(tmp_path)
    old = file.read_bytes()
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter, seed=2)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    if moment == "write":
        monkeypatch.setattr(safetensors.torch, "save", lambda *a: FailingBytes())
    else:
        monkeypatch.setattr(os, moment, fail)
    with pytest.raises((OSError, TypeError)):
        adapter.save(file)
    monkeypatch.undo()
    assert file.read_bytes() == old
    assert os.listdir(tmp_path) == [file.name]
    adapter.save(file)
    assert file.read_bytes() != old
    assert os.listdir(tmp_path) == [file.name]


class FailingBytes:
    """No buffer: writing it fails half way through."""


def test_a_save_can_be_repeated_and_is_readable_by_others(tmp_path: Path) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)

    def save() -> tuple[dict[str, str], dict[str, bytes]]:
        with safe_open(adapter.save(tmp_path), framework="pt") as stream:
            names = list(stream.keys())
            return stream.metadata(), {k: stream.get_tensor(k).numpy().tobytes() for k in names}

    first = save()
    assert save() == first
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o666 & ~mask
    adapter.detach()
    assert save() == first


# The published code's.


@pytest.fixture
def golden() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(GOLDEN / "unet")
    with np.load(GOLDEN / "unet_io.npz") as data:
        return model, {k: torch.from_numpy(data[k]) for k in data.files}


@torch.no_grad()
def test_published_checkpoint_gives_its_answers(golden: Any, tmp_path: Path) -> None:
    model, io = golden

    def run() -> Tensor:
        return model(io["sample"], io["timestep"], io["text"]).sample

    adapter = load_adapter(model, GOLDEN / "author_adapter.pt", lora_alpha=2.0)
    assert adapter.config.bands == Bands.author(3)
    assert len(adapter.matched) == int(io["layers"])
    assert float((run() - io["fera"]).abs().max()) <= 2e-5
    assert adapter.gate is not None
    assert float((adapter.gate - io["gate"]).abs().max()) <= 2e-5
    with adapter.disabled():
        assert float((run() - io["base"]).abs().max()) <= 2e-5
    want = run()
    adapter.save(tmp_path)
    adapter.detach()
    load_adapter(model, tmp_path)
    assert torch.equal(run(), want)


PREFIX = "base_model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.experts"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{PREFIX}.1.lora_up.weight"), rf"missing {PREFIX}.1.lora_up.weight"),
        (
            lambda t: [t.pop(f"{PREFIX}.2.lora_{s}.weight") for s in ("up", "down")],
            rf"missing {PREFIX}.2.lora_down.weight, {PREFIX}.2.lora_up.weight",
        ),
        (lambda t: t.pop("router.net.2.bias"), "missing router.net.2.bias"),
        (lambda t: t.update(epoch=torch.tensor(3)), "unknown epoch"),
        (lambda t: t.update(epoch=3), "flat dict of tensors, got dict"),
        (
            lambda t: t.update({f"{PREFIX}.3.lora_{s}.weight": torch.zeros(4, 4) for s in ("up", "down")}),
            r"experts.3.lora_down.weight must be \(4, in\)",
        ),
        (
            lambda t: t.update({f"{PREFIX}.0.lora_down.weight": torch.zeros(2, 32)}),
            r"experts.\d.lora_down.weight must be \(4, in\), the same for all experts, got",
        ),
        (
            lambda t: t.update({f"{PREFIX}.{m}.lora_down.weight": torch.zeros(4, 31) for m in range(3)}),
            r"attn1.to_q.lora_A must be of shape \(3, 4, 32\), got \(3, 4, 31\)",
        ),
        (lambda t: t.update({"router.net.2.bias": torch.zeros(4)}), "missing .*experts.3"),
        (
            lambda t: t.update({"router.net.0.weight": torch.zeros(64)}),
            "router must be a two-layer MLP",
        ),
        (
            lambda t: t.update({"router.net.2.weight": torch.zeros(3, 63)}),
            r"router.w2 must be of shape \(3, 64\), got \(3, 63\)",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if not k.startswith("router")],
            "keys must be the published code's .* got no expert",
        ),
        (
            lambda t: t.update({k.replace("mid_block", "mid_block2"): t.pop(k) for k in list(t) if "mid_b" in k}),
            "none at mid_block2",
        ),
        (
            lambda t: t.update({k: v.half() for k, v in list(t.items())[10:11]}),
            r"the same for all experts, got \(4, 16\) torch.float",
        ),
    ],
)
def test_published_checkpoint_is_read_strictly(
    golden: Any, tmp_path: Path, change: Callable[[dict[str, Any]], Any], text: str
) -> None:
    tensors = torch.load(GOLDEN / "author_adapter.pt", weights_only=True)
    change(tensors)
    torch.save(tensors, tmp_path / "changed.pt")
    _refused(golden[0], tmp_path / "changed.pt", text, lora_alpha=2.0)


def test_published_checkpoint_needs_its_alpha(golden: Any) -> None:
    _refused(
        golden[0],
        GOLDEN / "author_adapter.pt",
        "lora_alpha must be given for a published checkpoint",
    )
    _refused(golden[0], GOLDEN / "author_adapter.pt", "rank must be an integer", lora_alpha=1.0, rank=0)


class Boom:
    """Code that must not run."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))


def test_pickles_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Boom()}, tmp_path / "evil.pt")
    _refused(
        Plain(),
        tmp_path / "evil.pt",
        "must be a complete checkpoint of plain tensors",
        lora_alpha=1.0,
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 10, 5000, -10])
def test_truncated_published_checkpoint(golden: Any, tmp_path: Path, size: int) -> None:
    data = (GOLDEN / "author_adapter.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:size])
    _refused(golden[0], tmp_path / "cut.pt", "must be a complete checkpoint", lora_alpha=2.0)


def test_other_pickled_things(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    _refused(Plain(), tmp_path / "list.pt", "must be a flat dict of tensors, got list", lora_alpha=1.0)
    torch.save(Block(4).state_dict(), tmp_path / "model.pt")
    _refused(Plain(), tmp_path / "model.pt", "unknown to_out.0.bias", lora_alpha=1.0)


def test_public_handle(tmp_path: Path) -> None:
    file, _ = _saved(tmp_path)
    assert isinstance(load_adapter(Plain(), file), FeraAdapter)
