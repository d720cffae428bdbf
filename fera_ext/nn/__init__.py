"""Modules: the frequency-energy indicator, the soft frequency router and the adapted linear."""

from fera_ext.nn.linear import FeraLinear
from fera_ext.nn.router import FrequencyEnergyIndicator, SoftFrequencyRouter
from fera_ext.nn.state import GateState

__all__ = ["FeraLinear", "FrequencyEnergyIndicator", "GateState", "SoftFrequencyRouter"]
