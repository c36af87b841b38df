"""CCM: neural PDE experts trained along a physical direction, merged at a place on it, and measured (DESIGN 3.7)."""
