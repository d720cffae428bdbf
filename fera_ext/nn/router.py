"""From the latent to the gate: the frequency-energy indicator and the soft frequency router."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fera_ext import ops
from fera_ext.bands import Bands
from fera_ext.config import MAX_EXPERTS, MAX_HIDDEN


class FrequencyEnergyIndicator(nn.Module):
    """e = E / (sum E + 1e-8), E_k = ||H_k z||^2 (paper, frequency-energy indicator). No parameters.

    Args:
        bands: the definition of the K bands.
    """

    def __init__(self, bands: Bands) -> None:
        super().__init__()
        self.bands = bands

    def forward(self, z: Tensor) -> Tensor:
        """Latent (N, ..., H, W), any floating dtype, to (N, K) on the simplex, low to high frequency.

        The result is float32, or float64 for a float64 latent.

        Raises:
            ValueError: a latent the operator does not take.
        """
        with _full_precision(z):
            return ops.frequency_energy(z, self.bands)

    def extra_repr(self) -> str:
        return repr(self.bands)


class SoftFrequencyRouter(nn.Module):
    """gate = softmax((W2 relu(W1 e + b1) + b2) / tau) (paper, soft frequency router).

    Parameters ``w1`` (hidden, K), ``b1`` (hidden), ``w2`` (E, hidden) and ``b2`` (E), float32 masters,
    initialised as linear layers. Parameters in another dtype or on another device than the energy are
    converted on the way, so a model cast to half precision still routes in float32.

    Args:
        num_bands: K.
        num_experts: E, from 1 to 32.
        hidden: width of the hidden layer, from 1 to 256.
        tau: temperature, positive.
        device: where the parameters live.
    """

    def __init__(
        self,
        num_bands: int,
        num_experts: int,
        hidden: int = 64,
        tau: float = 0.7,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, most in (
            ("num_bands", num_bands, 16),
            ("num_experts", num_experts, MAX_EXPERTS),
            ("hidden", hidden, MAX_HIDDEN),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"SoftFrequencyRouter: {name} must be from 1 to {most}, got {value}")
        if not (math.isfinite(tau) and tau > 0):
            raise ValueError(f"SoftFrequencyRouter: tau must be positive, got {tau}")
        self.tau = float(tau)
        self.w1 = nn.Parameter(torch.empty(hidden, num_bands, device=device, dtype=torch.float32))
        self.b1 = nn.Parameter(torch.empty(hidden, device=device, dtype=torch.float32))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=torch.float32))
        self.b2 = nn.Parameter(torch.empty(num_experts, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/sqrt(fan_in), weights and biases, as torch.nn.Linear does."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1.0 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, energy: Tensor) -> Tensor:
        """Energy (N, K), float32 or float64, to the gate (N, E), rows on the simplex, energy's dtype.

        Raises:
            ValueError: shapes or dtypes the operator does not take.
        """
        w1, b1, w2, b2 = self._weights(energy.device, energy.dtype)
        with _full_precision(energy):
            return ops.router_softmax(energy, w1, b1, w2, b2, self.tau)

    def from_latent(self, z: Tensor, bands: Bands) -> Tensor:
        """Latent (N, ..., H, W) to the gate (N, E) in one operator; float32 (float64 for float64 z).

        Raises:
            ValueError: a latent the operator does not take.
        """
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        if "forward" in self.__dict__:
            # Something that must see calls of forward (a weight offloading hook) has replaced it.
            with _full_precision(z):
                energy = ops.frequency_energy(z, bands)
            return self(energy).to(z.device)
        w1, b1, w2, b2 = self._weights(z.device, dtype)
        with _full_precision(z):
            return ops.latent_gate(z, bands, w1, b1, w2, b2, self.tau)

    def _weights(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.w1.dtype == dtype and self.w1.device == device:
            return self.w1, self.b1, self.w2, self.b2
        w1, b1, w2, b2 = (w.to(device, dtype) for w in (self.w1, self.b1, self.w2, self.b2))
        return w1, b1, w2, b2

    def extra_repr(self) -> str:
        hidden, bands = self.w1.shape
        return f"num_bands={bands}, num_experts={self.w2.shape[0]}, hidden={hidden}, tau={self.tau}"


def _full_precision(z: Tensor) -> torch.autocast:
    """Autocast off: energies and gates stay in float32 whatever a trainer casts."""
    return torch.autocast(z.device.type, enabled=False)
