"""Formulas for errors, spectra and divergence of fields, and for routing statistics."""

from shodh_moe.metrics.fields import band_errors, divergence_report, energy_spectrum, nrmse, vrmse
from shodh_moe.metrics.latents import sample_mse
from shodh_moe.metrics.routing import bifurcated, conditional_mutual_information, mutual_information, purity

__all__ = [
    "band_errors",
    "bifurcated",
    "conditional_mutual_information",
    "divergence_report",
    "energy_spectrum",
    "mutual_information",
    "nrmse",
    "purity",
    "sample_mse",
    "vrmse",
]
