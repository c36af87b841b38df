"""The CCM benchmark: three families, several seeds, every baseline; resumable (docs/ccm.md)."""
