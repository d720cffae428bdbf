"""`fera-ext bench`: an operator's times beside its rivals', taken in one run, checked, in one table.

An operator is one module here with a function ``cases(options)`` and one line in :data:`OPERATORS`. A case
(:class:`fera_ext.bench.cases.Case`) builds its contenders, which are plain callables; everything else (checks,
capture, clocks, tables, files) is shared.
"""

OPERATORS = {
    "band_energy": "latent to band energies; backward to the latent",
    "latent_gate": "latent to expert gates; backward to the router's parameters",
    "fecl_loss": "the consistency loss; step is forward and backward to the prediction",
    "expert_linear": "the gated experts on a frozen linear; step is forward and backward to x, A, B and gate",
}
"""Operators by name; each is the module ``fera_ext.bench.<name>``."""

WHOLE = {"step": "training steps of whole diffusers models with clipping and AdamW, and sampling loops"}
"""What is timed beside single operators, with options of its own (:mod:`fera_ext.bench.step`)."""

_BANDS = ("FERA_BAND_VARIANT", ("auto", "cluster", "strips", "grid"))
_VARIANTS = {"expert_linear": ("FERA_EXPERT_VARIANT", ("all", "auto", "tiles", "mma", "wgmma", "library"))}


def variants(operator: str) -> tuple[str, tuple[str, ...]]:
    """The environment variable that forces a kernel variant, and the names to choose from, the default first.

    ``all`` is every one of them in turn, in rows of their own.
    """
    return _VARIANTS.get(operator, _BANDS)
