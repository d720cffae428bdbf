"""The operators of an adapted layer called without torch.ops: the same answers, errors and observers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_groups import Calls
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fera_ext import ops
from fera_ext._extension import C
from fera_ext.nn.sharing import is_plain

Arguments = dict[str, Any]
LINEAR, GROUP = torch.ops.fera_ext.expert_linear, torch.ops.fera_ext.expert_linear_group


def _linear(members: int = 1) -> Arguments:
    draw = torch.Generator().manual_seed(members)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)

    x, gate = drawn(2, 5, 8), drawn(2, 3)
    each = [(drawn(6, 8), drawn(6), drawn(3, 2, 8), drawn(6, 3, 2)) for _ in range(members)]
    if members == 1:
        weight, bias, lora_a, lora_b = each[0]
        one = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
        return {"x": x, **one, "gate": gate, "scale": 0.5}
    weights, biases, lora_as, lora_bs = map(list, zip(*each))
    biases[0] = None
    lists = {"weights": weights, "biases": biases, "lora_as": lora_as, "lora_bs": lora_bs}
    return {"x": x, **lists, "gate": gate, "scale": 0.5}


def _direct(given: Arguments) -> list[Tensor] | None:
    """What the direct call gives."""
    if "weights" in given:
        return C.expert_linear_group(**given)  # type: ignore[no-any-return]
    y = C.expert_linear(**given, dropout=0.0, seed=None, stream=0)
    return None if y is None else [y]


def _outputs(given: Arguments) -> list[Tensor]:
    return ops.expert_linear_group(**given) if "weights" in given else [ops.expert_linear(**given)]


def _leaves(given: Arguments) -> list[Tensor]:
    flat = [v for value in given.values() for v in (value if isinstance(value, list) else [value])]
    return [v for v in flat if isinstance(v, Tensor)]


@pytest.mark.parametrize("members", [1, 3])
def test_the_same_as_through_torch_ops(members: int) -> None:
    given = _linear(members)
    direct = _direct(given)
    assert direct is not None
    through = LINEAR(*given.values())[:1] if members == 1 else GROUP(*given.values())[0]
    for got, want in zip(direct, through, strict=True):
        assert torch.equal(got, want)
    leaves = _leaves(given)
    got, want = (torch.autograd.grad(sum(y.square().sum() for y in ys), leaves) for ys in (direct, through))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class _Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("members", [1, 3])
def test_whoever_listens_hears_the_operator(members: int) -> None:
    given = _linear(members)
    with _Seen() as seen:
        _outputs(given)
    assert len([name for name in seen.names if name.startswith("fera_ext.expert_linear")]) == 1
    with Calls() as calls:
        _outputs(given)
    assert calls.linears() == ((0, 1) if members == 1 else (1, 0))


class _Other(Tensor):
    pass


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("name", ["x", "gate", "bias", "lora_a", "lora_b"])
def test_other_tensors_go_through_torch_ops(members: int, name: str) -> None:
    given = _linear(members)
    want = _outputs(given)
    if members > 1 and name not in given:
        own = given["biases" if name == "bias" else f"{name}s"]
        own[1] = own[1].detach().as_subclass(_Other)
    else:
        given[name] = given[name].detach().as_subclass(_Other)
    assert _direct(given) is None
    for got, expected in zip(_outputs(given), want, strict=True):
        assert type(got) is _Other or name == "bias"  # torch.ops does not look into a list with None
        assert torch.equal(got.as_subclass(Tensor), expected)


def test_a_trace_has_the_operator() -> None:
    given = {name: v.detach() if isinstance(v, Tensor) else v for name, v in _linear().items()}

    def call(x: Tensor) -> Tensor:
        return ops.expert_linear(**{**given, "x": x})

    traced = torch.jit.trace(call, given["x"])
    assert "fera_ext::expert_linear" in str(traced.graph)
    assert torch.equal(traced(2 * given["x"]), call(2 * given["x"]))


@pytest.mark.parametrize("members", [1, 3])
def test_wrong_arguments_are_the_operators_own_errors(members: int) -> None:
    given = _linear(members)
    given["x"] = given["x"][..., :7]
    with pytest.raises(ValueError, match=r"lora_a.* must be|weight.* must be"):
        _direct(given)
    with pytest.raises(RuntimeError, match="expert_linear"):
        _outputs({**given, "x": "a latent"})
    if members > 1:
        with pytest.raises(RuntimeError, match="expert_linear_group"):
            _outputs({**given, "weights": [None, None, None]})
        tuples = {name: tuple(v) if isinstance(v, list) else v for name, v in _linear(members).items()}
        assert _direct(tuples) is None
        for got, want in zip(_outputs(tuples), _outputs(_linear(members)), strict=True):
            assert torch.equal(got, want)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


def _parametrised(base: nn.Linear) -> None:
    torch.nn.utils.parametrizations.weight_norm(base)


def _own_forward(base: nn.Linear) -> None:
    base.forward = lambda x: x  # type: ignore[method-assign]


def _subclass_weight(base: nn.Linear) -> None:
    base.weight = nn.Parameter(base.weight.detach().as_subclass(_Other))


LISTENERS: dict[str, Callable[[nn.Linear], Any]] = {
    "none": lambda base: None,
    "forward hook": lambda base: base.register_forward_hook(lambda *a: None),
    "forward pre-hook": lambda base: base.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda base: base.register_full_backward_hook(lambda *a: None),
    "backward pre-hook": lambda base: base.register_full_backward_pre_hook(lambda *a: None),
    "own forward": _own_forward,
    "another class": lambda base: setattr(base, "__class__", _Doubled),
    "a subclass's weight": _subclass_weight,
    "parametrised": _parametrised,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("listener", LISTENERS)
def test_what_is_plain_is_one_rule(listener: str, bias: bool) -> None:
    """Compiled graphs read the rule in Python, eager calls in C++."""
    base = nn.Linear(4, 4, bias=bias)
    LISTENERS[listener](base)
    found = C.plain_weights(base)
    assert (found is not None) == (listener == "none")
    if listener != "parametrised":  # whose weight is a plain tensor, but no parameter
        assert is_plain(base) == (found is not None)
    if found is not None:
        assert found[0] is base.weight
        assert found[1] is base.bias


def test_a_fan_sums_what_comes_back() -> None:
    gate = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    views = C.fan_out(gate, [(1, 3), (2, 2)])
    assert [tuple(v.shape) for v in views] == [(2, 3)] * 3 + [(2, 2, 3)] * 2
    assert all(torch.equal(v, gate.expand(v.shape)) for v in views)
    (views[0] * 2 + views[2] + views[3].sum(0) * 5).sum().backward()  # the others are not used
    assert gate.grad is not None
    assert torch.equal(gate.grad, torch.full_like(gate, 2 + 1 + 2 * 5))
    (alone,) = torch.autograd.grad(C.fan_out(gate, [(1, 4)])[1].sum(), gate)
    assert torch.equal(alone, torch.ones_like(gate))
