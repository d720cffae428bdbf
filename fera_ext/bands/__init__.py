"""Band definitions: what "frequency band k" means, as a small frozen value.

A router trained on one definition gives wrong gates on another, so a :class:`Bands` travels with every
adapter. A definition turns a latent size ``(H, W)`` into :class:`Filters`, in one of two forms the kernels
know:

* spectral: squared transfers on the half spectrum, ``E_k = 1/(HW) sum_w |Z(w)|^2 H_k(w)^2``;
* separable: per-axis matrices, ``b_j = L_j z R_j^T``, bands mixed from the ``b_j``, ``E_k = |band_k|^2``.

A new definition is one module with a ``filters(params, height, width)`` function and one line in
:data:`DEFINITIONS`.
"""

from fera_ext.bands.definition import DEFINITIONS, MAX_BANDS, MAX_SIDE, Bands, Filters

__all__ = ["DEFINITIONS", "MAX_BANDS", "MAX_SIDE", "Bands", "Filters"]
