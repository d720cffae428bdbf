"""The sizes the benchmarks time by default, what they ought to take, and how `--shapes` is read."""

from __future__ import annotations

Shape = tuple[int, ...]

SHAPES: tuple[Shape, ...] = (
    (1, 4, 64, 64),
    (4, 4, 64, 64),
    (4, 4, 128, 128),
    (4, 4, 104, 152),
    (14, 4, 72, 128),
    (4, 16, 128, 128),
    (4, 16, 104, 156),
    (32, 16, 128, 128),
    (1, 14, 4, 72, 128),
    (4, 14, 4, 72, 128),
)
"""The latents timed by default: what SD1.5, SDXL, SD3, FLUX and SVD trainers see, (N, ..., H, W)."""

ALL_SHAPES = (
    *SHAPES,
    *(
        shape
        for batch in (1, 2, 4, 8)
        for tail in ((4, 64, 64), (4, 128, 128), (16, 128, 128), (4, 104, 152), (14, 4, 72, 128), (16, 104, 156))
        if (shape := (batch, *tail)) not in SHAPES
    ),
)
QUICK_SHAPES: tuple[Shape, ...] = ((4, 4, 64, 64), (4, 4, 128, 128))

LINEARS: tuple[Shape, ...] = (
    (4, 4096, 320, 320),
    (4, 4096, 640, 640),
    (4, 4096, 640, 640, 3),
    (4, 1024, 1280, 1280),
    (4, 77, 2048, 1280),
    (4, 4096, 2432, 2432),
    (1, 4608, 3072, 3072),
    (1, 4608, 3072, 12288),
)
"""The linears timed by default: (gate rows, tokens of each, in, out), and how many linears share the input where it is
more than one (q, k and v)."""

ALL_LINEARS = (
    *LINEARS,
    *(
        shape
        for batch in (1, 2, 4, 8)
        for tail in (
            *((4096, 320, 320), (1024, 640, 640), (256, 1280, 1280), (64, 1280, 1280)),  # SD1.5
            *((77, 768, 320), (77, 768, 640), (77, 768, 1280)),
            *((4096, 640, 640), (1024, 1280, 1280), (3952, 640, 640), (988, 1280, 1280)),  # SDXL
            *((77, 2048, 640), (77, 2048, 1280)),
            *((4096, 2432, 2432), (4096, 3072, 3072), (512, 3072, 3072)),  # SD3.5, FLUX.1
            *((4608, 3072, 3072), (4608, 3072, 12288), (4608, 15360, 3072)),
            *((129024, 320, 320), (32256, 640, 640), (8064, 1280, 1280)),  # SVD, 14 frames
        )
        if (shape := (batch, *tail)) not in LINEARS
    ),
)
QUICK_LINEARS: tuple[Shape, ...] = ((4, 4096, 320, 320), (4, 1024, 1280, 1280))

# Microseconds on one H200, per call of 50 captured in one graph; float32, Bands.dog(3), E = 3.
_GATE: dict[Shape, int] = {
    (1, 4, 64, 64): 6,
    (4, 4, 64, 64): 6,
    (14, 4, 72, 128): 8,
    (4, 4, 128, 128): 8,
    (4, 4, 104, 152): 8,
    (4, 16, 128, 128): 8,
    (32, 16, 128, 128): 16,
}
_FECL: dict[Shape, int] = {(4, 4, 64, 64): 20, (4, 4, 128, 128): 20, (4, 16, 128, 128): 30}
GOALS: dict[tuple[str, str], dict[Shape, int]] = {("latent_gate", "forward"): _GATE, ("fecl_loss", "step"): _FECL}
EAGER_GOALS: dict[tuple[str, str], dict[Shape, int]] = {("fecl_loss", "step"): dict.fromkeys(_FECL, 150)}

LINEAR_GOALS: dict[Shape, dict[int, float]] = {
    (4, 4096, 320, 320): {12: 2.0, 128: 2.2},
    (4, 4096, 640, 640): {12: 1.6, 128: 1.75},
    (4, 4096, 640, 640, 3): {12: 1.4, 128: 1.5},
    (4, 1024, 1280, 1280): {12: 1.4, 128: 1.55},
    (4, 4096, 2432, 2432): {12: 1.12, 128: 1.2},
    (1, 4608, 3072, 3072): {12: 1.14, 128: 1.22},
    (1, 4608, 3072, 12288): {12: 1.08, 128: 1.15},
}
"""GPU time of a bfloat16 step over the frozen linear's, by the stacked rank R, on one H200."""

STEP_GOALS: dict[tuple[str, int, str], tuple[float, float | None]] = {
    ("sdxl", 4, "eager"): (1.15, 0.85),
    ("sdxl", 1, "eager"): (1.10, 0.55),
    ("sdxl", 4, "graph"): (1.10, None),
    ("sdxl", 1, "graph"): (1.18, None),
    ("sd15", 4, "eager"): (1.15, None),
    ("sd15", 4, "graph"): (1.12, None),
    ("flux", 1, "graph"): (1.10, None),
}
"""A bfloat16 training step of 3 experts of rank 4 over the frozen model's and over PEFT's, on one H200, by model, batch
and mode."""
SAMPLING_GOALS: dict[tuple[str, int, str], tuple[float, float | None]] = {("sdxl", 1, "graph"): (1.08, None)}
"""The same of a sampling loop with guidance."""
FECL_FORWARDS = 1.05
"""Frozen forwards that the consistency loss may add to a FeRA step."""


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """``4x4x64x64,1x14x4x72x128`` to tuples; ``default``, ``all`` and ``quick`` are lists.

    Raises:
        ValueError: fewer than three axes, no number, or a latent's side outside 1 to 512.
    """
    lists = {"default": SHAPES, "all": ALL_SHAPES, "quick": QUICK_SHAPES}
    if text in lists:
        return lists[text]
    found = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) < 3 or not all(n.isascii() and n.isdigit() and int(n) > 0 for n in numbers):
            raise ValueError(f"shapes must be default, all, or like 4x4x64x64,1x14x4x72x128, got {part!r}")
        shape = tuple(map(int, numbers))
        if max(shape[-2:]) > 512:
            raise ValueError(f"shapes must have heights and widths from 1 to 512, got {part!r}")
        found.append(shape)
    return tuple(dict.fromkeys(found))


def parse_linears(text: str) -> tuple[Shape, ...]:
    """``4x4096x320x320`` to (gate rows, tokens of each, in, out); ``default``, ``all`` and ``quick`` are lists.

    Three numbers are all the tokens, in and out: the default shape of that size, else one gate row. ``:3`` after
    them is a group of three linears that share their input, a fifth number of the shape.

    Raises:
        ValueError: neither three nor four positive numbers, or a group that is no positive number.
    """
    lists = {"default": LINEARS, "all": ALL_LINEARS, "quick": QUICK_LINEARS}
    if text in lists:
        return lists[text]
    known = {(g * t, i, o): (g, t, i, o) for g, t, i, o, *_ in LINEARS}
    found: list[Shape] = []
    for part in text.split(","):
        one, colon, group = part.partition(":")
        numbers = [*one.split("x"), group if colon else "1"]
        if len(numbers) not in (4, 5) or not all(n.isascii() and n.isdigit() and int(n) > 0 for n in numbers):
            raise ValueError(
                f"shapes must be default, all, or like 4x4096x320x320,4608x3072x3072,16384x640x640:3, got {part!r}"
            )
        *sizes, count = map(int, numbers)
        shape = tuple(sizes) if len(sizes) == 4 else known.get((sizes[0], sizes[1], sizes[2]), (1, *sizes))
        found.append(shape if count == 1 else (*shape, count))
    return tuple(dict.fromkeys(found))


def linear_name(shape: Shape) -> str:
    """A linear's shape as :func:`parse_linears` takes it."""
    name = "x".join(map(str, shape[:4]))
    return name if len(shape) == 4 else f"{name}:{shape[4]}"
