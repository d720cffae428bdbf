"""CUDA graphs on a CPU: what a step does to tensors is recorded operator by operator, and done again.

As in a CUDA graph, recording executes nothing, addresses are those of the recording, a Python number given to an
operator stays what it was, and reading a value (``item()``) is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class Log(TorchDispatchMode):
    """Notes every operator; what it writes to is kept as it was, to be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in written(func, args, kwargs):
            place = tensor.untyped_storage()
            if place.data_ptr() not in self.made | self.before.keys():
                whole = torch.empty(0, dtype=torch.uint8).set_(place)
                self.before[place.data_ptr()] = (whole, whole.clone())
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        # A view of what was there before is no new memory.
        self.made |= places(out) - places((args, kwargs)) - self.before.keys()
        return out


def places(values: Any) -> set[int]:
    """The addresses of the memory of all tensors in ``values``."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor)}


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


class Recording:
    """A recorded call."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        state = torch.get_rng_state()
        log = Log()
        with log:
            self.output = function()
        for whole, before in log.before.values():
            whole.copy_(before)
        torch.set_rng_state(state)
        self.calls = log.calls
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> Tensor:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            given = places((args, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                # A view is one already.
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)
        return self.output


class Recorder:
    """Stands for :class:`fera_ext.training.captured.CudaGraphs`.

    Attributes:
        recordings: all that were made.
    """

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def region(self) -> Any:
        return nullcontext()

    def record(self, function: Callable[[], Tensor]) -> Recording:
        self.recordings.append(Recording(function))
        return self.recordings[-1]
