"""CCM: train neural PDE experts along a physical direction, merge them at a point on it, and measure (DESIGN 3.7)."""
