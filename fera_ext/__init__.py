"""fera_ext: FeRA (arXiv 2511.17979) on hand-written C++/CUDA kernels.

Operators are in :mod:`fera_ext.ops`, modules in :mod:`fera_ext.nn`; a diffusers model is adapted with
:func:`attach` and an adapter is read back with :func:`load_adapter`. Names load on first use, so that
``import fera_ext`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Bands": "fera_ext.bands",
    "FeraConfig": "fera_ext.config",
    "FeraAdapter": "fera_ext.adapter",
    "attach": "fera_ext.adapter",
    "load_adapter": "fera_ext.checkpoint",
}

__all__ = [
    "Bands",
    "FeraAdapter",
    "FeraConfig",
    "__version__",
    "attach",
    "load_adapter",
    "nn",
    "ops",
    "reference",
]

if TYPE_CHECKING:
    from fera_ext import nn, ops, reference
    from fera_ext.adapter import FeraAdapter, attach
    from fera_ext.bands import Bands
    from fera_ext.checkpoint import load_adapter
    from fera_ext.config import FeraConfig


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in ("nn", "ops", "reference", "bands"):
        return importlib.import_module(f"fera_ext.{name}")
    raise AttributeError(f"module 'fera_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
