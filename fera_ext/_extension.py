"""Loads the compiled extension, or says in one sentence why it cannot and what to do."""

from __future__ import annotations

from types import ModuleType

import torch

BINDINGS = 11
"""Version of what csrc/torch/bindings.cpp and the Python halves expect of each other; raised together."""

REBUILD = "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps ."


def _major_minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def load() -> ModuleType:
    """Imports ``fera_ext._C``, which registers ``torch.ops.fera_ext``.

    Raises:
        ImportError: the extension was not built, was built for another torch, or a library is missing;
            the message names the fix.
    """
    try:
        from fera_ext._build_info import INFO
    except ImportError as error:
        raise ImportError(
            "fera_ext: the compiled extension must be built first, got a source tree without it; "
            "build it with: pip install --no-build-isolation -e ."
        ) from error
    built, found = str(INFO["torch"]), torch.__version__
    if _major_minor(built) != _major_minor(found) or INFO["torch_cuda"] != torch.version.cuda:
        raise ImportError(f"fera_ext: torch must be the one it was built against, {built}, got {found}; {REBUILD}")
    try:
        from fera_ext import _C
    except ImportError as error:
        raise ImportError(f"fera_ext: its libraries must load, got: {error}; {REBUILD}") from error
    # An editable install whose sources moved on without a rebuild.
    bindings = getattr(_C, "bindings", None)
    if bindings != BINDINGS:
        raise ImportError(f"fera_ext: the compiled bindings must be of version {BINDINGS}, got {bindings}; {REBUILD}")
    return _C


C = load()
