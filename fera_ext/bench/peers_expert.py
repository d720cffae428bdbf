"""Rivals of expert_linear: the frozen linear alone, the published code's pattern, plain PyTorch, PEFT's LoRA.

A case has one linear or a group of them on one input (q, k and v); a function of a case takes (x, gate, the weights,
the A, the B) and returns one output a linear.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fera_ext import reference
from fera_ext.bench.cases import Absent, Contender, differentiable

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session

SCALE = 1.25
"""alpha / r of every contender; not 1, which could be left out."""


@dataclass(frozen=True)
class Layer:
    """The tensors of a case: x (N, ..., in), gate (G, E) float32, and of each linear weight (out, in), lora_a
    (E, r, in), lora_b (out, E, r) and dy (N, ..., out), the fixed gradient of its output. No bias."""

    x: Tensor
    gate: Tensor
    weights: tuple[Tensor, ...]
    lora_as: tuple[Tensor, ...]
    lora_bs: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]

    @property
    def arguments(self) -> list[Tensor]:
        """(x, gate, weights, A, B)"""
        return [self.x, self.gate, *self.weights, *self.lora_as, *self.lora_bs]

    @property
    def leaves(self) -> list[int]:
        """Of the arguments those that a step reaches: x, A, B, gate."""
        count = len(self.weights)
        return [0, *range(2 + count, 2 + 3 * count), 1]


Together = Callable[..., tuple[Tensor, ...]]


def parts(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(weight, A, B) of each linear out of all weights, A and B."""
    count = len(tensors) // 3
    return list(zip(tensors[:count], tensors[count : 2 * count], tensors[2 * count :]))


def separately(linear: Callable[..., Tensor]) -> Together:
    """``linear(x, weight, lora_a, lora_b, gate)``, called for each of a case's linears."""

    def together(x: Tensor, gate: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([linear(x, weight, lora_a, lora_b, gate) for weight, lora_a, lora_b in parts(tensors)])

    return together


def frozen(layer: Layer, pass_name: str, work: tuple[int, int]) -> Contender:
    """The linears without adapters; their step ends at dx. ``work``: their bytes and FLOPs."""
    more: dict[str, Any] = {"comparable": False, "form": "no adapter", "work": work}

    def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple([F.linear(x, weight) for weight in weights])

    return differentiable("frozen", linears, [layer.x, *layer.weights], [0], pass_name, layer.dys, **more)


def middle(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
    """One LoRA of rank R = E·r whose middle is scaled by the gate."""
    return reference.expert_linear(x, weight, None, lora_a, lora_b, gate, SCALE)


def _factor(x: Tensor, gate: Tensor, rank: int) -> Tensor:
    """(G, R) gate and scale, one an expert's column, x's dtype."""
    return (gate * SCALE).to(x.dtype).repeat_interleave(rank, 1)


def folded(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
    """Gate and scale folded into B, one B a gate row; a batched product adds onto the base."""
    groups, rank = gate.shape[0], lora_a.shape[1]
    factor = _factor(x, gate, rank)
    gated = lora_b.to(x.dtype).flatten(1) * factor[:, None]  # (G, out, R)
    hidden = F.linear(x, lora_a.to(x.dtype).flatten(0, 1)).reshape(groups, -1, factor.shape[1])
    base = F.linear(x, weight)
    return torch.baddbmm(base.view(groups, -1, weight.shape[0]), hidden, gated.transpose(1, 2)).view_as(base)


def one_down(x: Tensor, gate: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The A of a group stacked: one down projection for all its linears; the middle scaled by the gate."""
    groups = gate.shape[0]
    stacked = torch.cat([lora_a.to(x.dtype).flatten(0, 1) for _, lora_a, _ in parts(tensors)])
    hidden = F.linear(x, stacked).reshape(groups, -1, stacked.shape[0])
    outputs, start = [], 0
    for weight, lora_a, lora_b in parts(tensors):
        width = lora_a.shape[0] * lora_a.shape[1]
        scaled = hidden[..., start : start + width] * _factor(x, gate, lora_a.shape[1])[:, None]
        base = F.linear(x, weight)
        outputs.append(base + F.linear(scaled, lora_b.to(x.dtype).flatten(1)).view_as(base))
        start += width
    return tuple(outputs)


FORMS: dict[str, Together] = {"middle": separately(middle), "folded": separately(folded)}
GROUP_FORMS: dict[str, Together] = FORMS | {"one down projection": one_down}


def plain(session: Session, layer: Layer, pass_name: str) -> Iterator[Contender | Absent]:
    """The rivals ``torch`` and ``compiled``: the stacked form that is fastest in the case."""
    if "torch" not in session.options.peers and "compiled" not in session.options.peers:
        return
    forms = FORMS if len(layer.weights) == 1 else GROUP_FORMS
    contenders = {
        name: differentiable("torch", form, layer.arguments, layer.leaves, pass_name, layer.dys, form=name)
        for name, form in forms.items()
    }
    ranks = tuple(layer.lora_as[0].shape)
    key = ("expert_linear", len(layer.weights), tuple(layer.dys[0].shape), layer.x.shape[-1], ranks)
    name = session.fastest((*key, pass_name), contenders)
    if "torch" in session.options.peers:
        yield contenders[name]
    if "compiled" not in session.options.peers:
        return
    compiled = session.compiler((*key, name), pass_name, forms[name])
    if compiled is None:
        yield Absent("compiled", session.compiler.refusal)
    else:
        more: dict[str, Any] = {"form": name, "compiles": True}
        yield differentiable("compiled", compiled, layer.arguments, layer.leaves, pass_name, layer.dys, **more)


def published_update(x: Tensor, gate: Tensor, *pairs: Tensor) -> Tensor:
    """One pair of linears an expert, the outputs stacked, weighted by the gate, summed.

    pairs: E times (r, in), then E times (out, r).
    """
    experts = gate.shape[1]
    outputs = [
        F.linear(F.linear(x, pairs[m].to(x.dtype)), pairs[experts + m].to(x.dtype)) * SCALE for m in range(experts)
    ]
    weights = gate.to(x.dtype).view(*gate.shape, *[1] * (x.ndim - 1))
    return (torch.stack(outputs, dim=1) * weights).sum(dim=1)


def published_linear(x: Tensor, weight: Tensor, gate: Tensor, *pairs: Tensor) -> Tensor:
    """The frozen linear, without a bias, and :func:`published_update`."""
    return F.linear(x, weight) + published_update(x, gate, *pairs)


def published(layer: Layer, pass_name: str) -> Contender:
    """The published code's pattern, rewritten plainly; each expert's pair are leaves of their own."""
    experts, count = layer.gate.shape[1], len(layer.weights)
    pairs = [
        pair
        for lora_a, lora_b in zip(layer.lora_as, layer.lora_bs)
        for pair in (*lora_a.unbind(0), *(b.contiguous() for b in lora_b.unbind(1)))
    ]

    def linears(x: Tensor, gate: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, rest = tensors[:count], tensors[count:]
        return tuple(
            [published_linear(x, w, gate, *rest[2 * experts * i :][: 2 * experts]) for i, w in enumerate(weights)]
        )

    def arrange(answers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outs, rest = answers[:count], answers[count:]
        if not rest:
            return outs
        dx, dgate, *grads = rest
        of = [grads[experts * i :][:experts] for i in range(2 * count)]
        das, dbs = [torch.stack(g) for g in of[::2]], [torch.stack(g, dim=1) for g in of[1::2]]
        return (*outs, dx, *das, *dbs, dgate)

    arguments = [layer.x, layer.gate, *layer.weights, *pairs]
    leaves = [0, 1, *range(2 + count, len(arguments))]
    return differentiable("published", linears, arguments, leaves, pass_name, layer.dys, arrange=arrange)


def peft_lora(session: Session, layer: Layer, pass_name: str) -> Contender | Absent:
    """PEFT's own LoRA layer of rank R on the same linears, without dropout: what people use today.

    It has no gate, so its answers are others by design. With float32 masters it runs under autocast, as its users
    run it.
    """
    if "peft" not in session.options.peers:
        return Absent("peft", "not asked for")
    if importlib.util.find_spec("peft") is None:
        return Absent("peft", "the package peft is not installed")
    try:
        modules = peft_layers(layer)
    except Exception as error:
        return Absent("peft", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    autocast = session.options.masters and layer.x.dtype != torch.float32

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, x.dtype) if autocast else nullcontext():
            return tuple([module(x) for module in modules])

    def inference() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return forward(layer.x)

    leaf = layer.x.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        outs = forward(leaf)
        return (*(out.detach() for out in outs), *torch.autograd.grad(outs, [leaf, *trained], layer.dys))

    run = step if pass_name == "step" else inference
    return Contender("peft", run, form="no gate: answers not compared", comparable=False)


def peft_layers(layer: Layer) -> list[nn.Module]:
    """Each nn.Linear inside PEFT's LoRA layer, A and B as the stacked experts', in the adapters' dtype."""
    linears = zip(layer.weights, layer.lora_as, layer.lora_bs)
    return [_peft_layer(weight, a.flatten(0, 1), b.flatten(1)) for weight, a, b in linears]


def _peft_layer(weight: Tensor, stacked_a: Tensor, stacked_b: Tensor) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    rank, width = stacked_a.shape
    linear = nn.Linear(width, stacked_b.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.ModuleDict({"linear": linear})
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=0.0, target_modules=["linear"])  # type: ignore
    inject_adapter_in_model(config, model)
    wrapped = model["linear"]
    for name, parameter in wrapped.named_parameters():
        for part, value in (("lora_A", stacked_a), ("lora_B", stacked_b)):
            if name.startswith(part):
                parameter.data = value.clone().contiguous()
    return wrapped
