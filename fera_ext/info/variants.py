"""Which kernel variant the band operators take for a latent: the answer is the dispatcher's own."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch

from fera_ext.bands import Bands

VARIABLE = "FERA_BAND_VARIANT"
SINGLE = {
    "router_softmax": "one block a sample (CUDA), one sample a task (CPU)",
    "expert_linear": "base product by the vendor's library, then expert_update in place",
    "expert_linear_group": "one kernel each way where the core has it for all members (wgmma), else one by one",
    "expert_update": "tiled skinny products (FERA_EXPERT_VARIANT=library: the vendor's, gate and scale folded into B)",
}
"""Operators with one variant. The others run on the band kernels: their variants are asked for."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""fera_dtype of fera.h."""

FLOAT32 = ((1, 4, 64, 64), (4, 4, 128, 128), (14, 4, 72, 128), (4, 4, 104, 152), (4, 16, 128, 128), (2, 4, 96, 96))
LATENTS = (
    *((shape, torch.float32) for shape in FLOAT32),
    ((1, 3, 509, 31), torch.float32),
    ((4, 4, 64, 64), torch.float64),
)
"""Usual latents, one with many planes, and sizes and a dtype that have neither cluster nor strips."""

FORCE = (
    f"{VARIABLE}=cluster, strips or grid forces a variant on CUDA; an operator refuses a latent that does not have it. "
    "auto or unset: the dispatcher chooses. FERA_CPU_ISA=generic or avx2 forces a lower instruction set on the CPU."
)
NO_GPU = (
    "no GPU in use, so the table is the CPU's. On a GPU each row asks the same question of the CUDA dispatcher: "
    "cluster (a sample in the shared memories of a thread block cluster: sm_90 and newer, spectral bands, "
    "float32, float16 or bfloat16, a size with a kernel of its own), strips (rows by the blocks of a cluster: sm_90 "
    "and newer, separable bands of at most four blurs, float32, float16 or bfloat16) or grid (one cooperative launch, "
    "everything else)"
)


def band_variant(shape: tuple[int, ...], dtype: torch.dtype, bands: Bands, device: torch.device) -> str:
    """The kernel variant that the band operators take for a contiguous latent on ``device`` now.

    Args:
        shape: (N, ..., H, W).
        dtype: the latent's.
        bands: the band definition.
        device: a CPU, or a CUDA device of a build with CUDA kernels.

    Returns:
        The instruction set on the CPU; ``"cluster"``, ``"strips"`` or ``"grid"`` on CUDA, and ``""`` where the build
        has no CUDA kernels or FERA_BAND_VARIANT asks for what the latent does not have.
    """
    filters = bands.filters(shape[-2], shape[-1], torch.device("cpu"), torch.float32)
    return _ask(shape, dtype, bands.count, list(filters.reach), device)


def _ask(shape: tuple[int, ...], dtype: torch.dtype, count: int, reach: list[int], device: torch.device) -> str:
    from fera_ext._extension import C

    planes = 1
    for size in shape[1:-2]:
        planes *= size
    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext():
        return C.band_variant(shape[0], planes, *shape[-2:], DTYPES[dtype], count, reach, cuda)


def _why(shape: tuple[int, ...], dtype: torch.dtype, bands: Bands, device: torch.device, variant: str) -> str:
    """The reason in words; what it does not know of the device, it asks the dispatcher."""
    spectral = bands.filters(shape[-2], shape[-1], torch.device("cpu"), torch.float32).spectral
    method = "FFT of packed plane pairs" if spectral else "banded products, rows then columns"
    if device.type == "cpu":
        forced = os.environ.get("FERA_CPU_ISA")
        widest = "forced by FERA_CPU_ISA" if forced == variant else "the widest instruction set here"
        return f"{method}; {widest}"
    wish = os.environ.get(VARIABLE) or "auto"
    if variant == "":
        known = wish in ("auto", "cluster", "strips", "grid")
        return f"refused: {VARIABLE}={wish} asks for " + ("what this latent does not have" if known else "no variant")
    if variant == "cluster":
        return f"{method}; a kernel for {shape[-2]} x {shape[-1]}, its sample in a cluster's shared memories"
    if variant == "strips":
        return f"{method}; strips of rows by the blocks of a cluster"
    if wish == "grid":
        reason = f"forced by {VARIABLE}"
    elif dtype == torch.float64:
        reason = "neither clusters nor strips in float64"
    elif torch.cuda.get_device_capability(device) < (9, 0):
        reason = "no thread block clusters before sm_90"
    elif not spectral:
        reason = "cluster kernels are spectral, and no strips of these blurs fit this device"
    else:
        reason = f"no cluster kernel for {shape[-2]} x {shape[-1]}, or none that fits this device"
    return f"{method}; {reason}"


def explain(devices: list[torch.device]) -> dict[str, Any]:
    """What `fera-ext info --explain` says, JSON-ready.

    Args:
        devices: those whose dispatcher is asked.
    """
    rows = []
    for device in devices:
        for shape, dtype in LATENTS:
            for bands in (Bands.dog(3), Bands.author(3)):
                variant = band_variant(shape, dtype, bands, device)
                rows.append(
                    {
                        "device": str(device),
                        "latent": list(shape),
                        "dtype": str(dtype).removeprefix("torch."),
                        "bands": bands.name,
                        "variant": variant,
                        "why": _why(shape, dtype, bands, device, variant),
                    }
                )
    gpu = any(device.type == "cuda" for device in devices)
    return {"variants": rows, "force": FORCE, "note": "" if gpu else NO_GPU, "operators": SINGLE}


def render(explained: dict[str, Any], console: Any) -> None:
    """Prints :func:`explain`'s answer: a table a GPU, or the CPU's where there is none."""
    from rich.table import Table

    rows = explained["variants"]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    for device in devices:
        mine = [row for row in rows if row["device"] == device]
        if device == "cpu" and len(devices) > 1:
            console.print(f"[bold]band kernels on cpu[/]: {mine[0]['variant']} for every latent")
            continue
        table = Table(title=f"variants of the band kernels on {device}", title_justify="left")
        for column in ("latent", "dtype", "bands", "variant", "why"):
            table.add_column(column)
        for row in mine:
            latent = ", ".join(map(str, row["latent"]))
            table.add_row(f"({latent})", row["dtype"], row["bands"], row["variant"] or "[red]none[/]", row["why"])
        console.print(table)
    if explained["note"]:
        console.print(explained["note"])
    console.print(f"[bold]to force one[/]: {explained['force']}")
    for name, sentence in explained["operators"].items():
        console.print(f"[bold]{name}[/]: {sentence}")
