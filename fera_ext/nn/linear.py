"""The adapted linear layer."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fera_ext import ops
from fera_ext.nn.sharing import SharedInput, heard_everywhere, is_plain, plain_weights, weights_of
from fera_ext.nn.state import GateState, draw_seed


class GateSource(Protocol):
    """What an adapted layer reads: the gate (G, E) and whether the experts act.

    A source may also have a ``seed``, one int64 in a tensor, for the dropout of all layers that read it; where it has
    none, or None, each call of a layer draws one.
    """

    gate: Tensor | None
    enabled: bool

    def view(self, device: torch.device) -> Tensor:
        """(G, E), the gate's values on ``device``, for one operator call."""


class FeraLinear(nn.Module):
    """y = base(x) + sum_m gate[b, m] * s * B_m (A_m x), s = alpha / rank (paper, experts).

    Parameters ``lora_A`` (E, r, in), Kaiming-uniform with a = sqrt(5), and ``lora_B`` (out, E, r), zero, so
    that a new layer changes nothing. The wrapped layer is ``base``; its parameters are left as they are.

    A plain linear runs as one operator with its own product. Any other base layer with ``in_features`` and
    ``out_features`` (quantised, sharded, hooked) is called, and the experts' update is added to its output.

    Args:
        base: the layer to adapt.
        rank: r.
        num_experts: E.
        alpha: numerator of the scale.
        dropout: dropout on the experts' input while training, in [0, 1). It takes no memory and, but where a vendor's
            library makes the products, no pass of its own: see :func:`fera_ext.ops.expert_linear`.
        source: where the gate comes from; one object shared by all layers of a model.
        dtype: of the parameters; float32 masters by default, whatever the base layer's dtype.
        device: of the parameters; by default the base layer's.
        stream: the layer's number: layers with one seed and different numbers drop differently. A layer that is called
            twice in one forward drops the same elements twice. A compiled graph drops others than eager mode does.

    Raises:
        ValueError: a base layer without ``in_features`` and ``out_features``, or on the meta device.
    """

    expert_parameters = ("lora_A", "lora_B")

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        num_experts: int,
        alpha: float,
        dropout: float,
        source: GateSource,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        stream: int = 0,
    ) -> None:
        super().__init__()
        reason = unsupported(base)
        if reason:
            raise ValueError(f"FeraLinear: base must be {reason}, got {type(base).__name__}")
        self.base = base
        self.source = source
        self.shared: SharedInput | None = None  # with the layers that are given the same tensor
        self.scale = alpha / rank
        self.dropout = dropout
        self.stream = stream
        shapes = self.expert_shapes(self.in_features, self.out_features, rank, num_experts)
        device = device or _device(base)
        for name in self.expert_parameters:
            empty = torch.empty(shapes[name], dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty))
        self._place_number()
        self.reset_parameters()
        self.train(base.training)

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @staticmethod
    def expert_shapes(in_features: int, out_features: int, rank: int, num_experts: int) -> dict[str, tuple[int, ...]]:
        """The shape of every expert parameter, by name."""
        return {
            "lora_A": (num_experts, rank, in_features),
            "lora_B": (out_features, num_experts, rank),
        }

    @property
    def dropout(self) -> float:
        """Dropout on the experts' input while training; may be set at any time."""
        return self._dropout

    @dropout.setter
    def dropout(self, share: float) -> None:
        self._dropout = float(share)
        if share and isinstance(self.source, GateState):
            self.source.drops = True
        if "lora_A" in self._parameters:
            self._place_number()

    @property
    def in_features(self) -> int:
        """Width of the input, the base layer's."""
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Width of the output, the base layer's."""
        return int(self.base.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: models ask their linears for its dtype and device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias  # type: ignore[return-value]

    def _apply(self, *args: Any, **kwargs: Any) -> FeraLinear:
        super()._apply(*args, **kwargs)
        self._place_number()
        return self

    def _place_number(self) -> None:
        # Follows the parameters. No buffer: those go into broadcasts and are left empty by to_empty. Only where it may
        # be read: an allocator's smallest block, 512 bytes on CUDA, is much for hundreds of layers.
        self._number: Tensor | None = torch.tensor([self.stream], device=self.lora_A.device) if self._dropout else None

    def reset_parameters(self) -> None:
        """A Kaiming-uniform with a = sqrt(5), each expert as its own linear; B zero."""
        with torch.no_grad():
            for expert in self.lora_A:
                nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (N, ..., in) to (N, ..., out); N is a multiple of the gate's G, row n uses gate n*G//N.

        Raises:
            RuntimeError: no gate is bound, because the denoiser's own forward is not running.
        """
        source = self.source
        if not source.enabled:
            return self._disabled(x)
        gate = source.gate
        if gate is None:
            raise RuntimeError(
                "FeraLinear: gate must be computed by a call of the denoiser this layer belongs to, got a "
                "call of the layer outside of one (or recomputed by a backward pass that does not start "
                "at the denoiser's output)"
            )
        if torch.compiler.is_compiling():
            return self._traced(x, gate)
        if self.shared is not None:
            out = self.shared.output(self, x, gate)
            if out is not None:
                return out
        view = source.view(x.device)
        own = weights_of(self)
        if own is None:
            return self._updated(x, view)
        dropped = self._dropped(x) if self._dropout else ()
        return ops.expert_linear(x, *own, view, self.scale, *dropped)

    def _disabled(self, x: Tensor) -> Tensor:
        """The base layer's own output, (N, ..., out)."""
        base: Any = self._modules["base"]
        own = None if torch.compiler.is_compiling() or heard_everywhere() else plain_weights(base)
        # What a call of the module is, at a third of its host time.
        return base(x) if own is None else F.linear(x, *own)

    def _traced(self, x: Tensor, gate: Tensor) -> Tensor:
        """What a compiled graph takes, (N, ..., out): no state from one call to the next, the gate as it is."""
        if gate.device != x.device:
            gate = gate.to(x.device)
        if not is_plain(self.base):
            return self._updated(x, gate)
        weight, bias, dropped = self.weight, self.bias, self._dropped(x)
        return ops.expert_linear(x, weight, bias, self.lora_A, self.lora_B, gate, self.scale, *dropped)

    def _updated(self, x: Tensor, gate: Tensor) -> Tensor:
        """The base layer's own output with the experts' update, (N, ..., out)."""
        out = self.base(x)
        # A base layer that computes in another dtype (autocast, quantised) decides the update's dtype.
        x = x.to(out.dtype)
        return ops.expert_update(out, x, self.lora_A, self.lora_B, gate, self.scale, *self._dropped(x))

    @property
    def drops(self) -> bool:
        """Whether a call drops parts of the experts' input."""
        return self._dropout > 0 and self.training

    def _dropped(self, x: Tensor) -> tuple[float, Tensor, int] | tuple[()]:
        """The operators' dropout, seed and stream, or nothing where nothing is dropped."""
        if not self.drops:
            return ()
        seed: Tensor | None = getattr(self.source, "seed", None)
        seed = draw_seed(x.device) if seed is None else seed.to(x.device)
        if torch.compiler.is_compiling():
            # A module's number would be a constant of the graph, and each of a model's equal blocks a graph of its own.
            number = self._number
            assert number is not None  # there is one where there is dropout
            return self._dropout, seed + number.to(x.device), 0
        return self._dropout, seed, self.stream

    def extra_repr(self) -> str:
        experts, rank, _ = self.lora_A.shape
        return f"num_experts={experts}, rank={rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def unsupported(base: nn.Module) -> str | None:
    """The rule that ``base`` breaks, or None where it can be adapted."""
    if isinstance(base, FeraLinear):
        return "a layer without experts"
    if not (
        isinstance(getattr(base, "in_features", None), int) and isinstance(getattr(base, "out_features", None), int)
    ):
        return "a linear layer (with in_features and out_features)"
    if _device(base).type == "meta":
        return "on a real device (attach before offloading)"
    return None


def _device(base: nn.Module) -> torch.device:
    for tensors in (base.parameters(), base.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")
