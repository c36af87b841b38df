"""Formulas for errors, spectra and divergence of fields, and for routing statistics."""
