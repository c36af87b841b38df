"""CCM: neural PDE experts trained along a physical direction, merged at a point on it, and measured (DESIGN 3.7)."""
