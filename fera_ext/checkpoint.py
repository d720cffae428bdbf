"""Adapters on disk: safetensors with metadata, and the published code's checkpoints; both strict.

A file of ours holds ``router.w1`` and the like (float32, float64 in a float64 model),
``layers.<path>.lora_A`` and ``lora_B`` (one floating dtype), for custom bands ``bands.masks`` (float64), and
this metadata, all strings:

* ``format``: ``fera_ext``; ``format_version``; ``library_version``;
* ``config``: :meth:`fera_ext.FeraConfig.to_dict` as JSON; ``bands``: its bands once more, for readers of
  nothing else;
* ``base_model_class``; ``layers``: the adapted paths as a JSON list.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import fera_ext
from fera_ext.adapter.adapter import FeraAdapter, check_tensors, listed
from fera_ext.adapter.attaching import attach_layers, check_model
from fera_ext.adapter.matching import match
from fera_ext.architectures import Extract
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig
from fera_ext.nn import FeraLinear

FILE_NAME = "fera_adapter.safetensors"
"""The file's name inside a directory."""

FORMAT = "fera_ext"
FORMAT_VERSION = 1
MASKS = "bands.masks"
_METADATA = (
    "format",
    "format_version",
    "library_version",
    "config",
    "bands",
    "base_model_class",
    "layers",
)


class AdapterFileError(ValueError):
    """An adapter file that is not, or not exactly, what the model and the overrides ask for."""


@dataclass
class _Contents:
    """A file, read: its tensors under our names, and what it says about itself."""

    tensors: dict[str, Tensor]
    config: FeraConfig
    layers: list[str]
    base_class: str | None


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    check_base_class: bool = True,
    latent: Extract | None = None,
    group_projections: bool = True,
    **overrides: Any,
) -> FeraAdapter:
    """Attach a saved adapter. Strict: every key is used, every key is found; never unpickles code.

    Args:
        model: the denoiser, without an adapter.
        path: a ``.safetensors`` file of ours, a directory that holds ``fera_adapter.safetensors``, or
            (any other name) a checkpoint of the published code, a dict of plain tensors.
        dtype: of the experts' parameters; the file's if not given.
        check_base_class: whether the model must be of the class the adapter was trained on.
        latent: as in :func:`fera_ext.attach`.
        group_projections: likewise.
        **overrides: fields of :class:`FeraConfig` to use instead of the file's. A published checkpoint
            does not store its alpha, so ``lora_alpha`` is required there; its bands are
            ``Bands.author(K)`` unless given.

    Returns:
        The attached adapter.

    Raises:
        AdapterFileError: (a ValueError) a truncated or foreign file, keys missing or unknown, wrong
            shapes or dtypes, another base model class. The keys are named; the model is left as it was.
        FileNotFoundError: there is no such file.
        TypeError: ``model`` is not the denoiser itself.
    """
    check_model(model)
    file = _locate(path)
    try:
        read = _read_own if file.suffix == ".safetensors" else _read_published
        contents = read(file, overrides)
        matched = _matched(model, contents, check_base_class)
        experts = _check(contents, matched)
    except AdapterFileError:
        raise
    except ValueError as error:
        raise AdapterFileError(f"load_adapter: {file.name} must fit the model, got: {error}") from error
    adapter = attach_layers(model, contents.config, matched, dtype or experts, latent, group_projections)
    try:
        _copy(adapter, contents.tensors)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def save_adapter(adapter: FeraAdapter, path: str | os.PathLike[str]) -> str:
    """Write an adapter's file; :meth:`fera_ext.adapter.FeraAdapter.save`.

    Raises:
        OSError: it cannot be written; an older file is left as it was.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        target = target / FILE_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    config = adapter.config
    state = adapter.state_dict()
    experts = functools.reduce(torch.promote_types, (t.dtype for k, t in state.items() if k.startswith("layers.")))
    router = torch.promote_types(state["router.w1"].dtype, torch.float32)
    tensors = {
        name: tensor.to("cpu", router if name.startswith("router.") else experts, copy=True).contiguous()
        for name, tensor in state.items()
    }
    if config.bands.masks is not None:
        tensors[MASKS] = config.bands.masks
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": fera_ext.__version__,
        "config": json.dumps(config.to_dict()),
        "bands": json.dumps(config.bands.to_dict()),
        "base_model_class": type(adapter.model).__name__,
        "layers": json.dumps(adapter.matched),
    }
    _write(target, safetensors.torch.save(tensors, metadata))
    return str(target)


def _write(target: Path, data: bytes) -> None:
    """All of ``data`` or nothing: a temporary file beside ``target``, synced, then renamed over it."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _locate(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"load_adapter: path must be an adapter file or its directory, got {path}")
    return file


def _read_own(file: Path, overrides: Mapping[str, Any]) -> _Contents:
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterFileError(
            f"load_adapter: file must be complete and in safetensors format, got {file} ({error})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"load_adapter: file must be an adapter written by fera_ext, got {file} with keys {listed(sorted(tensors))}"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise AdapterFileError(
            f"load_adapter: format_version must be {FORMAT_VERSION}, got "
            f"{metadata.get('format_version')} (written by fera_ext {metadata.get('library_version')})"
        )
    missing = [key for key in _METADATA if key not in metadata]
    if missing:
        raise AdapterFileError(
            f"load_adapter: metadata must hold {', '.join(_METADATA)}, got none of {', '.join(missing)}"
        )
    try:
        config = json.loads(metadata["config"])
        layers = json.loads(metadata["layers"])
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"load_adapter: metadata must be JSON, got {error}") from error
    if not (isinstance(config, dict) and isinstance(config.get("bands"), dict)):
        raise AdapterFileError(f"load_adapter: config must hold bands, got {metadata['config']}")
    if not (isinstance(layers, list) and layers and all(isinstance(p, str) for p in layers)):
        raise AdapterFileError(f"load_adapter: layers must be a list of paths, got {metadata['layers']}")
    masks = tensors.pop(MASKS, None) if config["bands"].get("name") == "custom" else None
    own = FeraConfig.from_dict(config, masks).override(**overrides)
    return _Contents(tensors, own, layers, metadata["base_model_class"])


_EXPERT_KEY = re.compile(r"base_model\.(.+)\.experts\.(\d+)\.lora_(down|up)\.weight")
_ROUTER_KEYS = {
    "router.net.0.weight": "router.w1",
    "router.net.0.bias": "router.b1",
    "router.net.2.weight": "router.w2",
    "router.net.2.bias": "router.b2",
}


def _read_published(file: Path, overrides: Mapping[str, Any]) -> _Contents:
    """A checkpoint of the published code: per expert ``lora_down`` (r, in) and ``lora_up`` (out, r)."""
    data = io.BytesIO(file.read_bytes())
    try:
        raw = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterFileError(
            f"load_adapter: file must be a complete checkpoint of plain tensors, got {file} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if not isinstance(raw, dict) or not all(isinstance(v, Tensor) for v in raw.values()):
        raise AdapterFileError(f"load_adapter: file must be a flat dict of tensors, got {type(raw).__name__} in {file}")
    tensors = {own: raw[key] for key, own in _ROUTER_KEYS.items() if key in raw}
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    unknown = []
    for key, tensor in raw.items():
        found = _EXPERT_KEY.fullmatch(str(key))
        if found:
            path, expert, side = found.groups()
            experts.setdefault(path, {"down": {}, "up": {}})[side][int(expert)] = tensor
        elif key not in _ROUTER_KEYS:
            unknown.append(str(key))
    if unknown or not experts:
        raise AdapterFileError(
            "load_adapter: keys must be the published code's (router.net.*, base_model.*.experts.*), got "
            + (f"unknown {listed(sorted(unknown))}" if unknown else "no expert")
        )
    missing = [key for key in _ROUTER_KEYS if key not in raw]
    shapes = {
        key: raw[key].ndim for key in _ROUTER_KEYS if key in raw and raw[key].ndim != (2 if "weight" in key else 1)
    }
    if shapes:
        raise AdapterFileError(f"load_adapter: router must be a two-layer MLP, got axes {shapes}")
    count = len(raw["router.net.2.bias"]) if "router.net.2.bias" in raw else 0
    for path, sides in experts.items():
        for side, found_experts in sides.items():
            missing += [
                f"base_model.{path}.experts.{m}.lora_{side}.weight"
                for m in range(max(count, len(found_experts)))
                if m not in found_experts
            ]
    if missing:
        raise AdapterFileError(f"load_adapter: keys must be complete, got missing {listed(missing)}")
    rank = next(iter(experts.values()))["down"][0].shape[0]
    for path, sides in experts.items():
        tensors[f"layers.{path}.lora_A"] = _stack(path, "down", sides["down"], 0, rank)
        stacked = _stack(path, "up", sides["up"], -1, rank)
        tensors[f"layers.{path}.lora_B"] = stacked.permute(1, 0, 2).contiguous()
    if "lora_alpha" not in overrides:
        raise AdapterFileError(
            "load_adapter: lora_alpha must be given for a published checkpoint, which does not store it, got none"
        )
    config = FeraConfig(
        rank=rank,
        num_experts=count,
        bands=Bands.author(raw["router.net.0.weight"].shape[1]),
        router_hidden=raw["router.net.0.weight"].shape[0],
        target_modules=list(experts),
    )
    return _Contents(tensors, config.override(**overrides), list(experts), None)


def _stack(path: str, side: str, experts: dict[int, Tensor], axis: int, rank: int) -> Tensor:
    first = experts[0]
    for m, tensor in experts.items():
        same = tensor.shape == first.shape and tensor.dtype == first.dtype
        if tensor.ndim != 2 or not same or tensor.shape[axis] != rank:
            rule = f"({rank}, in)" if side == "down" else f"(out, {rank})"
            raise AdapterFileError(
                f"load_adapter: base_model.{path}.experts.{m}.lora_{side}.weight must be {rule}, the same "
                f"for all experts, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    return torch.stack([experts[m] for m in range(len(experts))])


def _matched(model: nn.Module, contents: _Contents, check_base_class: bool) -> dict[str, nn.Module]:
    """The model's layers that the file adapts, all of them and no others."""
    own_class = type(model).__name__
    if check_base_class and contents.base_class not in (None, own_class):
        raise AdapterFileError(
            f"load_adapter: base model class must be {contents.base_class}, got {own_class} "
            "(check_base_class=False loads it anyway)"
        )
    present = dict(model.named_modules(remove_duplicate=False))
    absent = [path for path in contents.layers if path not in present]
    if absent:
        raise AdapterFileError(
            f"load_adapter: model must have every adapted layer of the file, got none at {listed(absent)}"
        )
    matched = match(model, contents.config.target_modules)
    if set(matched) != set(contents.layers):
        only_model = sorted(set(matched) - set(contents.layers))
        only_file = sorted(set(contents.layers) - set(matched))
        parts = [f"only in the model: {listed(only_model)}"] * bool(only_model)
        parts += [f"only in the file: {listed(only_file)}"] * bool(only_file)
        raise AdapterFileError(
            "load_adapter: target_modules must match exactly the file's layers, got " + "; ".join(parts)
        )
    return matched


def _check(contents: _Contents, matched: Mapping[str, nn.Module]) -> torch.dtype:
    """Whether the tensors are exactly the configuration's; the experts' dtype."""
    config, tensors = contents.config, contents.tensors
    floating = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    experts = next((t.dtype for k, t in tensors.items() if k.startswith("layers.")), torch.float32)
    router = next((t.dtype for k, t in tensors.items() if k.startswith("router.")), torch.float32)
    for name, dtype, allowed in (
        ("experts", experts, floating),
        ("router", router, (torch.float32, torch.float64)),
    ):
        if dtype not in allowed:
            raise AdapterFileError(f"load_adapter: {name} must be one of {', '.join(map(str, allowed))}, got {dtype}")
    hidden, count = config.router_hidden, config.bands.count
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "router.w1": ((hidden, count), router),
        "router.b1": ((hidden,), router),
        "router.w2": ((config.num_experts, hidden), router),
        "router.b2": ((config.num_experts,), router),
    }
    for path, module in matched.items():
        wanted = FeraLinear.expert_shapes(
            int(module.in_features),  # type: ignore[arg-type]
            int(module.out_features),  # type: ignore[arg-type]
            config.rank,
            config.num_experts,
        )
        for name, shape in wanted.items():
            shapes[f"layers.{path}.{name}"] = (shape, experts)
    try:
        check_tensors("load_adapter", tensors, {k: (torch.Size(s), d) for k, (s, d) in shapes.items()})
    except ValueError as error:
        raise AdapterFileError(str(error)) from None
    return experts


def _copy(adapter: FeraAdapter, tensors: Mapping[str, Tensor]) -> None:
    if tensors["router.w1"].dtype == torch.float64:
        adapter.router.double()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(tensors[name])
