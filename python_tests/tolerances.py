"""Every tolerance of the operator and model tests, with its origin. Errors are ||out - ref|| / ||ref|| against float64.

The design's section 5: float32 <= 2e-6 for energies, gates and FECL, <= 1e-5 for linears; bfloat16 <= 6e-3 and
float16 <= 1e-3, never worse than 1.1 x what plain PyTorch gives in the same dtype.
"""

import torch
from torch import Tensor

ENERGY_F32 = 2e-6  # design, section 5
ROUTER_F32 = 1e-6  # the end-to-end issue, golden line
LINEAR_F32 = 1e-5  # design, section 5
LINEAR_F64 = 1e-12  # the end-to-end issue, golden line
ENERGY_F64 = 1e-12  # float64 arithmetic, sums of up to 10^6 terms
GOLDEN_F32_TAPS = 3e-7  # design, section 10: the published code builds its Gaussian taps in float32
FECL_GOLDEN = 1e-5  # the end-to-end issue, golden line
LOW = {torch.bfloat16: 6e-3, torch.float16: 1e-3}  # design, section 5
SLACK = 1.1  # design, section 5: over plain PyTorch in the same dtype

# Whole models, against the same model on plain PyTorch twins: what float32's order of summation costs through a
# model's depth. Of the tiny models on a CPU the twins in float32 are up to 1.0e-6 (outputs) and 3.1e-5 (gradients)
# from the same models in float64. The rest is for cuDNN, whose convolutions round to TF32 by default: a last bit
# that differs may become a difference of 2^-11 there.
MODEL_F32 = 1e-4
MODEL_GRAD_F32 = 2e-3
MODEL_GRAD_FLOOR = 1e-7  # norms of gradients that are zero up to cancellation, as a layer's before a norm layer

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, in float64; NaN if either holds one. Zero against zero is zero."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape, (out.shape, ref.shape)
    norm = ref.norm()
    return float((out - ref).norm() / norm) if norm > 0 else float(out.norm())


def energy_limit(dtype: torch.dtype) -> float:
    """Energies accumulate in float32 for every narrower latent, so only float64 differs."""
    return ENERGY_F64 if dtype == torch.float64 else ENERGY_F32


def linear_limit(dtype: torch.dtype) -> float:
    """The bound of outputs that are stored in ``dtype``."""
    return {torch.float64: LINEAR_F64, torch.float32: LINEAR_F32}.get(dtype) or LOW[dtype]
