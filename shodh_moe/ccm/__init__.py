"""CCM: neural PDE experts composed along a physical direction."""
