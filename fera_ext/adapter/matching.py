"""Which linears a configuration's targets mean, and what to say when they mean none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn

from fera_ext.nn.linear import unsupported


def match(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """The modules that ``targets`` mean, by dotted path, in the model's order.

    A list entry matches a path that equals it or ends with ``"." + entry``; a string is a regular
    expression that must match the whole path. A module reachable by two paths appears under both.

    Raises:
        ValueError: nothing matches (near names are listed), or a match is no layer that can be adapted.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and matches(path, targets):
            found[path] = module
    if not found:
        raise ValueError(_no_match(model, targets))
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in found.items():
        rule = unsupported(module)
        if rule:
            raise ValueError(
                f"attach: {path} must be {rule} to be a target, got {type(module).__name__}{_nearest(path, model)}"
            )
        parent = modules[path.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"attach: {path} must be a linear that its parent calls to be a target, got one whose "
                "weight torch.nn.MultiheadAttention reads directly"
            )
    return found


def matches(path: str, targets: Sequence[str] | str) -> bool:
    """Whether one dotted path is meant."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(suffix_of(t, path) for t in targets)


def suffix_of(target: str, path: str) -> bool:
    """Whether a list entry means ``path``."""
    return path == target or path.endswith("." + target)


def linear_paths(model: nn.Module) -> list[str]:
    """The dotted paths of all layers that could be adapted."""
    return [p for p, m in model.named_modules() if p and not unsupported(m)]


def _no_match(model: nn.Module, targets: Sequence[str] | str) -> str:
    paths = linear_paths(model)
    if not paths:
        return f"attach: model must have linear layers, got {type(model).__name__} without any"
    suffixes = sorted({s for p in paths for s in _suffixes(p)})
    asked = [targets] if isinstance(targets, str) else list(targets)
    near: list[str] = []
    for target in asked:
        near += [n for n in difflib.get_close_matches(target, suffixes, n=5, cutoff=0.5) if n not in near]
    if not near:
        near = sorted({_suffixes(p)[0] for p in paths})[:12]
    return (
        f"attach: target_modules must match linear layers of {type(model).__name__}, got {targets!r} "
        f"which match none; near names: {', '.join(near)}"
    )


def _suffixes(path: str) -> list[str]:
    """The last one, two and three names of a path; a bare index such as ``0`` is no name."""
    names = path.split(".")
    ends = [".".join(names[-n:]) for n in range(1, min(3, len(names)) + 1)]
    return [e for e in ends if not e.isdigit()]


def _nearest(path: str, model: nn.Module) -> str:
    inside = [p for p in linear_paths(model) if p.startswith(path + ".")]
    return f"; it contains {', '.join(inside[:4])}" if inside else ""
