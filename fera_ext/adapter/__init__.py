"""Attach FeRA to a denoiser, and the handle on what was attached."""

from fera_ext.adapter.adapter import FeraAdapter
from fera_ext.adapter.attaching import attach

__all__ = ["FeraAdapter", "attach"]
