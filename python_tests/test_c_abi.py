"""The core without torch: called through its C ABI from NumPy on the CPU and from CuPy on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import tolerances
import torch

import fera_ext
from fera_ext import reference
from fera_ext.bands import Bands

i32, i64, f64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
CPU, CUDA = 0, 1


class Latent(ctypes.Structure):
    _fields_ = [
        ("data", pointer),
        ("dtype", i32),
        *((name, i64) for name in ("n", "p", "h", "w", "stride_n", "stride_p", "stride_h", "stride_w")),
    ]


class Filters(ctypes.Structure):
    _fields_ = [
        ("bands", i32),
        ("blurs", i32),
        ("table", pointer),
        ("right", pointer),
        ("mix", pointer),
        ("reach", i32 * 16),
    ]


class BandEnergy(ctypes.Structure):
    _fields_ = [
        ("z", Latent),
        ("filters", Filters),
        ("eps", f64),
        ("energy", pointer),
        ("indicator", pointer),
        ("total", pointer),
    ]


class Context(ctypes.Structure):
    _fields_ = [
        ("stream", pointer),
        ("parallel", pointer),
        ("pool", pointer),
        ("workspace", pointer),
        ("workspace_bytes", ctypes.c_size_t),
    ]


@pytest.fixture(scope="module")
def core() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(fera_ext.__file__).parent / "lib" / "libfera.so"))
    library.fera_band_energy_workspace.restype = ctypes.c_size_t
    for name in ("fera_last_error", "fera_band_variant", "fera_cpu_isa"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _energies(core: ctypes.CDLL, xp, device: int, address, stream: int | None) -> np.ndarray:
    """Indicator of a fixed latent, with arrays of module ``xp`` (numpy or cupy)."""
    table = Bands.dog(3).filters(24, 40, torch.device("cpu"), torch.float32).table.numpy()
    masks = xp.asarray(table)
    z = xp.asarray(_latent())
    out = xp.full((2, 3), float("nan"), dtype=xp.float32)
    args = BandEnergy(
        Latent(address(z), 0, 2, 4, 24, 40, 4 * 24 * 40, 24 * 40, 40, 1),
        Filters(3, 0, address(masks), None, None),
        1e-8,
        None,
        address(out),
        None,
    )
    size = core.fera_band_energy_workspace(ctypes.byref(args), device)
    workspace = xp.empty(size + 256, dtype=xp.uint8)
    start = (address(workspace) + 255) // 256 * 256
    context = Context(stream, None, None, start, size)
    run = core.fera_band_energy_cuda if device == CUDA else core.fera_band_energy_cpu
    assert run(ctypes.byref(args), ctypes.byref(context)) == 0, core.fera_last_error().decode()
    short = Context(stream, None, None, start, size - 1)
    assert run(ctypes.byref(args), ctypes.byref(short)) == 1
    assert b"workspace must be at least" in core.fera_last_error()
    return out if xp is np else xp.asnumpy(out)


def _latent() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 4, 24, 40)).astype(np.float32)


def _check(out: np.ndarray) -> None:
    exact = reference.frequency_energy(torch.from_numpy(_latent()).double(), Bands.dog(3))
    assert tolerances.error(torch.from_numpy(out), exact) <= tolerances.ENERGY_F32


def test_from_numpy(core: ctypes.CDLL) -> None:
    _check(_energies(core, np, CPU, lambda a: a.ctypes.data, None))


@pytest.mark.gpu
def test_from_cupy(core: ctypes.CDLL) -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        _check(_energies(core, cupy, CUDA, lambda a: a.data.ptr, stream.ptr))


def test_a_build_without_cuda_says_so(core: ctypes.CDLL) -> None:
    if core.fera_has_cuda():
        pytest.skip("this core was built with CUDA")
    args, context = BandEnergy(), Context()
    assert core.fera_band_energy_cuda(ctypes.byref(args), ctypes.byref(context)) == 2
    assert b"build without CUDA" in core.fera_last_error()


def test_variant_reads_no_pointer(core: ctypes.CDLL) -> None:
    latent = Latent(None, 0, 2, 4, 24, 40, 4 * 24 * 40, 24 * 40, 40, 1)
    filters = Filters(3, 0, None, None, None)
    variant = core.fera_band_variant(ctypes.byref(latent), ctypes.byref(filters), CPU)
    assert variant == core.fera_cpu_isa()
    if not core.fera_has_cuda():
        assert core.fera_band_variant(ctypes.byref(latent), ctypes.byref(filters), CUDA) == b""
