"""The operators: documented functions over ``torch.ops.fera_ext``, on CPU and CUDA, each with backward."""

from fera_ext._extension import C as _C  # noqa: F401 (registers the operators)
from fera_ext.ops.band_energy import band_energy, frequency_energy
from fera_ext.ops.expert_group import expert_linear_group
from fera_ext.ops.expert_linear import expert_linear, expert_update
from fera_ext.ops.fecl import fecl_loss
from fera_ext.ops.router import latent_gate, router_softmax

__all__ = [
    "band_energy",
    "expert_linear",
    "expert_linear_group",
    "expert_update",
    "fecl_loss",
    "frequency_energy",
    "latent_gate",
    "router_softmax",
]
