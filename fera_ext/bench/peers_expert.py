"""Rivals of expert_linear: the frozen linear alone, the published code's pattern, plain PyTorch, PEFT's LoRA."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
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
    """The tensors of a case: x (N, ..., in), weight (out, in), lora_a (E, r, in), lora_b (out, E, r), gate (G, E)
    float32, and dy (N, ..., out), the fixed gradient of the output. No bias."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor
    dy: Tensor

    @property
    def arguments(self) -> list[Tensor]:
        """In the operator's order."""
        return [self.x, self.weight, self.lora_a, self.lora_b, self.gate]

    leaves = (0, 2, 3, 4)


def frozen(layer: Layer, pass_name: str, work: tuple[int, int]) -> Contender:
    """The linear without adapters; its step ends at dx. ``work``: its bytes and FLOPs."""
    more: dict[str, Any] = {"comparable": False, "form": "no adapter", "work": work}
    return differentiable("frozen", F.linear, [layer.x, layer.weight], [0], pass_name, layer.dy, **more)


def middle(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
    """One LoRA of rank R = E·r whose middle is scaled by the gate."""
    return reference.expert_linear(x, weight, None, lora_a, lora_b, gate, SCALE)


def folded(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor) -> Tensor:
    """Gate and scale folded into B, one B a gate row; a batched product adds onto the base."""
    groups, rank = gate.shape[0], lora_a.shape[1]
    factor = (gate * SCALE).to(x.dtype).repeat_interleave(rank, 1)
    gated = lora_b.to(x.dtype).flatten(1) * factor[:, None]  # (G, out, R)
    hidden = F.linear(x, lora_a.to(x.dtype).flatten(0, 1)).reshape(groups, -1, factor.shape[1])
    base = F.linear(x, weight)
    return torch.baddbmm(base.view(groups, -1, weight.shape[0]), hidden, gated.transpose(1, 2)).view_as(base)


FORMS: dict[str, Callable[..., Tensor]] = {"middle": middle, "folded": folded}


def plain(session: Session, layer: Layer, pass_name: str) -> Iterator[Contender | Absent]:
    """The rivals ``torch`` and ``compiled``: the stacked form that is faster in the case."""
    if "torch" not in session.options.peers and "compiled" not in session.options.peers:
        return
    contenders = {
        name: differentiable("torch", form, layer.arguments, layer.leaves, pass_name, layer.dy, form=name)
        for name, form in FORMS.items()
    }
    key = ("expert_linear", tuple(layer.dy.shape), layer.x.shape[-1], tuple(layer.lora_a.shape))
    name = session.fastest((*key, pass_name), contenders)
    if "torch" in session.options.peers:
        yield contenders[name]
    if "compiled" not in session.options.peers:
        return
    compiled = session.compiler((*key, name), pass_name, FORMS[name])
    if compiled is None:
        yield Absent("compiled", f"torch.compile had used up its {session.compiler.seconds:g} s (--compile-seconds)")
    else:
        more: dict[str, Any] = {"form": name, "compiles": True}
        yield differentiable("compiled", compiled, layer.arguments, layer.leaves, pass_name, layer.dy, **more)


def published_linear(x: Tensor, weight: Tensor, gate: Tensor, *pairs: Tensor) -> Tensor:
    """One pair of linears an expert, the outputs stacked, weighted by the gate, summed.

    pairs: E times (r, in), then E times (out, r).
    """
    experts = gate.shape[1]
    outputs = [
        F.linear(F.linear(x, pairs[m].to(x.dtype)), pairs[experts + m].to(x.dtype)) * SCALE for m in range(experts)
    ]
    weights = gate.to(x.dtype).view(*gate.shape, *[1] * (x.ndim - 1))
    return F.linear(x, weight) + (torch.stack(outputs, dim=1) * weights).sum(dim=1)


def published(layer: Layer, pass_name: str) -> Contender:
    """The published code's pattern, rewritten plainly; each expert's pair are leaves of their own."""
    experts = layer.lora_a.shape[0]
    pairs = [*layer.lora_a.unbind(0), *(b.contiguous() for b in layer.lora_b.unbind(1))]

    def arrange(answers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(answers) == 1:
            return answers
        out, dx, dgate, *grads = answers
        return out, dx, torch.stack(grads[:experts]), torch.stack(grads[experts:], dim=1), dgate

    arguments = [layer.x, layer.weight, layer.gate, *pairs]
    leaves = [0, *range(2, len(arguments))]
    return differentiable("published", published_linear, arguments, leaves, pass_name, layer.dy, arrange=arrange)


def peft_lora(session: Session, layer: Layer, pass_name: str) -> Contender | Absent:
    """PEFT's own LoRA layer of rank R on the same linear, without dropout: what people use today.

    It has no gate, so its answers are others by design. With float32 masters it runs under autocast, as its users
    run it.
    """
    if "peft" not in session.options.peers:
        return Absent("peft", "not asked for")
    if importlib.util.find_spec("peft") is None:
        return Absent("peft", "the package peft is not installed")
    try:
        module = peft_layer(layer)
    except Exception as error:
        return Absent("peft", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    trained = [p for p in module.parameters() if p.requires_grad]
    autocast = session.options.masters and layer.x.dtype != torch.float32

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, x.dtype) if autocast else nullcontext():
            return module(x)

    def inference() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(layer.x),)

    leaf = layer.x.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        out = forward(leaf)
        return (out.detach(), *torch.autograd.grad(out, [leaf, *trained], layer.dy))

    run = step if pass_name == "step" else inference
    return Contender("peft", run, form="no gate: answers not compared", comparable=False)


def peft_layer(layer: Layer) -> nn.Module:
    """nn.Linear inside PEFT's LoRA layer, A and B as the stacked experts', in the adapters' dtype."""
    from peft import LoraConfig, inject_adapter_in_model

    stacked_a, stacked_b = layer.lora_a.flatten(0, 1), layer.lora_b.flatten(1)
    rank, width = stacked_a.shape
    linear = nn.Linear(width, stacked_b.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    model = nn.ModuleDict({"linear": linear})
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, lora_dropout=0.0, target_modules=["linear"])  # type: ignore
    inject_adapter_in_model(config, model)
    wrapped = model["linear"]
    for name, parameter in wrapped.named_parameters():
        for part, value in (("lora_A", stacked_a), ("lora_B", stacked_b)):
            if name.startswith(part):
                parameter.data = value.clone().contiguous()
    return wrapped
