"""The cuFFT rival, through CuPy: cached batched plans, preallocated arrays, and fused kernels around them.

forward: R2C, masked sums, and one kernel that finishes (with the router for latent_gate). backward and step
multiply the spectrum by one mask and go back by C2R. The backward of band_energy starts from the kept
spectrum, as autograd's does.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fera_ext.bands import Bands, Filters
from fera_ext.bench.cases import TAU, Absent, Contender, upstream
from fera_ext.bench.peers_cufft_kernels import SOURCE, THREADS
from fera_ext.bench.peers_torch import folded_masks

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session

EPS = 1e-8
BLOCKS = 256
"""Masked sums split the planes until about so many blocks run."""


def cufft(session: Session, operator: str, pass_name: str, bands: Bands, arguments: Sequence[Tensor]) -> Any:
    """The contender, or why there is none.

    Args:
        session: the run.
        operator, pass_name: what is timed.
        bands: the band definition.
        arguments: the operator's tensors, on the device.
    """
    if "cufft" not in session.options.peers:
        return Absent("cufft", "not asked for")
    if session.device.type != "cuda":
        return Absent("cufft", "there is no GPU")
    if bands.name == "author":
        return Absent("cufft", "the bands are zero-padded blurs (author)")
    if (operator, pass_name) == ("latent_gate", "backward"):
        return Absent("cufft", "the pass has no transform (the router's gradients)")
    if importlib.util.find_spec("cupy") is None:
        return Absent("cufft", "CuPy is missing (pip install cupy-cuda13x)")
    try:
        run = MAKERS[operator, pass_name](bands, *arguments)
        torch.cuda.synchronize()  # CuPy's own copies went through another stream
    except Exception as error:
        # Whatever stops CuPy here (a driver too old, no NVRTC) must not stop the others.
        return Absent("cufft", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return Contender("cufft", run, form="CuPy")


@functools.cache
def _kernels() -> Any:  # pragma: no cover (needs CuPy and a GPU)
    import cupy

    return cupy.RawModule(code=SOURCE, options=("--std=c++17",))


class Spectrum:  # pragma: no cover (needs CuPy and a GPU)
    """Plans and arrays for the transforms of latents of one shape, all on the current stream.

    Args:
        bands: a definition with spectral filters.
        shape: (N, ..., H, W)
        sets: how many such latents are transformed in one batch.
        whole: adds a last mask of ones, the energy of all bands together.
    """

    def __init__(self, bands: Bands, shape: Sequence[int], sets: int = 1, whole: bool = False) -> None:
        import cupy
        from cupy.cuda import cufft
        from cupyx.scipy.fft import get_fft_plan

        self.cupy = cupy
        self.samples = shape[0]
        self.rows = sets * shape[0]
        self.planes = math.prod(shape[1:-2])
        self.height, self.width = shape[-2:]
        self.columns = self.width // 2 + 1
        self.size = self.height * self.columns
        masks = folded_masks(bands.filters(self.height, self.width, torch.device("cpu"), torch.float64), self.width)
        if whole:
            ones = masks.new_ones((1, self.height, self.columns))
            masks = torch.cat((masks, folded_masks(Filters(ones), self.width)))
        self.count = masks.shape[0]
        self.masks = cupy.asarray(masks.flatten(1).float().numpy())
        self.chunks = -(-self.size // THREADS)
        self.splits = max(1, min(self.planes, BLOCKS // (self.chunks * self.rows)))
        self.pieces = self.chunks * self.splits
        batch = (self.rows * self.planes, self.height)
        self.real = cupy.empty((*batch, self.width), cupy.float32)
        self.spectrum = cupy.empty((*batch, self.columns), cupy.complex64)
        self.partial = cupy.empty((self.rows * self.pieces, self.count), cupy.float32)
        self.forward_plan = get_fft_plan(self.real, axes=(1, 2), value_type="R2C")
        self.directions = (cufft.CUFFT_FORWARD, cufft.CUFFT_INVERSE)
        self.stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def view(self, tensor: Tensor) -> Any:
        """A CuPy array on the tensor's memory."""
        return self.cupy.asarray(tensor.detach())

    def bound(self, name: str, grid: tuple[int, ...], *arguments: Any) -> Callable[[], None]:
        """One launch with its arguments fixed; Python numbers go as int32 and float32."""
        kernel = _kernels().get_function(name)
        kinds = {int: self.cupy.int32, float: self.cupy.float32}
        fixed = tuple(kinds[type(a)](a) if type(a) in kinds else a for a in arguments)
        return lambda: kernel(grid, (THREADS,), fixed)

    def staged(self, *tensors: Tensor) -> tuple[list[Any], Callable[[], None]]:
        """float32 views of contiguous tensors, and what fills those that are copies of 16-bit ones."""
        buffers = [t if t.dtype == torch.float32 else torch.empty_like(t, dtype=torch.float32) for t in tensors]

        def fill() -> None:
            for buffer, tensor in zip(buffers, tensors):
                if buffer is not tensor:
                    buffer.copy_(tensor)

        return [self.view(b) for b in buffers], fill

    def transform(self, real: Any) -> None:
        """R2C of all planes into ``spectrum``."""
        self.forward_plan.fft(real, self.spectrum, self.directions[0])

    def sums(self) -> Callable[[], None]:
        """The launch of the masked sums of ``spectrum`` into ``partial``."""
        grid = (self.chunks, self.rows, self.splits)
        sizes = (self.planes, self.size, self.count)
        return self.bound("band_sums", grid, self.spectrum, self.masks, self.partial, *sizes)

    def inverse(self) -> tuple[Any, Any, Any]:
        """(plan, half spectrum (overwritten), real output) for the N samples of one latent."""
        from cupyx.scipy.fft import get_fft_plan

        batch = (self.samples * self.planes, self.height)
        half = self.cupy.empty((*batch, self.columns), self.cupy.complex64)
        real = self.cupy.empty((*batch, self.width), self.cupy.float32)
        plan = get_fft_plan(half, shape=(self.height, self.width), axes=(1, 2), value_type="C2R")
        return plan, half, real

    def output(self, real: Any, like: Tensor) -> Callable[[], Tensor]:
        """Gives a float32 CuPy array as a tensor of ``like``'s shape and dtype, copied for 16 bits."""
        wide = torch.as_tensor(real, device=like.device).view(like.shape)
        if like.dtype == torch.float32:
            return lambda: wide
        narrow = torch.empty_like(like)
        return lambda: narrow.copy_(wide)


Run = Callable[[], tuple[Tensor, ...]]


def _energy_forward(bands: Bands, z: Tensor) -> Run:  # pragma: no cover (needs CuPy and a GPU)
    s = Spectrum(bands, z.shape)
    (real,), fill = s.staged(z)
    out = torch.empty((s.samples, s.count), device=z.device)
    sums, finish = s.sums(), s.bound("energies", (s.samples,), s.partial, s.view(out), s.pieces, s.count)

    def run() -> tuple[Tensor, ...]:
        with s.stream:
            fill()
            s.transform(real)
            sums()
            finish()
        return (out,)

    return run


def _energy_backward(bands: Bands, z: Tensor) -> Run:  # pragma: no cover (needs CuPy and a GPU)
    s = Spectrum(bands, z.shape)
    (real,), fill = s.staged(z)
    factors = s.view(upstream(torch.empty((s.samples, s.count), device=z.device)))
    plan, half, gradient = s.inverse()
    give = s.output(gradient, z)
    with s.stream:
        fill()
        s.transform(real)
    grid = (s.chunks, s.samples, s.splits)
    sizes = (s.planes, s.size, s.count, s.columns, s.width)
    weigh = s.bound("weigh", grid, s.spectrum, s.masks, factors, half, *sizes)

    def run() -> tuple[Tensor, ...]:
        with s.stream:
            weigh()
            plan.fft(half, gradient, s.directions[1])
        return (give(),)

    return run


def _gate_forward(bands: Bands, z: Tensor, *weights: Tensor) -> Run:  # pragma: no cover (needs CuPy and a GPU)
    s = Spectrum(bands, z.shape)
    (real,), fill = s.staged(z)
    router = [s.view(w) for w in weights]
    hidden, experts = weights[0].shape[0], weights[2].shape[0]
    out = torch.empty((s.samples, experts), device=z.device)
    sizes = (s.pieces, s.count, hidden, experts, EPS, TAU)
    sums, finish = s.sums(), s.bound("gate", (s.samples,), s.partial, *router, s.view(out), *sizes)

    def run() -> tuple[Tensor, ...]:
        with s.stream:
            fill()
            s.transform(real)
            sums()
            finish()
        return (out,)

    return run


def _fecl(gradient_too: bool) -> Callable[..., Run]:
    def make(
        bands: Bands, base: Tensor, fera: Tensor, target: Tensor
    ) -> Run:  # pragma: no cover (needs CuPy and a GPU)
        s = Spectrum(bands, fera.shape, sets=2, whole=True)
        inputs, fill = s.staged(base, fera, target)
        energy, factors = (s.cupy.empty((s.rows, s.count), s.cupy.float32) for _ in range(2))
        out = torch.empty((), device=fera.device)
        last = (s.samples, s.pieces, s.count - 1, EPS)
        subtract = s.bound("differences", (-(-fera.numel() // THREADS),), *inputs, s.real, fera.numel())
        sums, finish = s.sums(), s.bound("consistency", (1,), s.partial, energy, factors, s.view(out), *last)
        if gradient_too:
            plan, half, gradient = s.inverse()
            give = s.output(gradient, fera)
            sizes = (s.samples, s.planes, s.size, s.count, s.columns, s.width)
            grid = (s.chunks, s.samples, s.splits)
            weigh = s.bound("weigh_both", grid, s.spectrum, s.masks, factors, half, *sizes)

        def run() -> tuple[Tensor, ...]:
            with s.stream:
                fill()
                subtract()
                s.transform(s.real)
                sums()
                finish()
                if not gradient_too:
                    return (out,)
                weigh()
                plan.fft(half, gradient, s.directions[1])
            return out, give()

        return run

    return make


MAKERS: dict[tuple[str, str], Callable[..., Run]] = {
    ("band_energy", "forward"): _energy_forward,
    ("band_energy", "backward"): _energy_backward,
    ("latent_gate", "forward"): _gate_forward,
    ("fecl_loss", "forward"): _fecl(False),
    ("fecl_loss", "step"): _fecl(True),
}
