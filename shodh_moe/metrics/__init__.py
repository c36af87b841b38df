"""Formulas of what is measured: errors, spectra and divergence of fields, and numbers of a routing."""
