"""Audit whether joint training harms a domain and whether the mixture of experts prevents it (docs/audit.md)."""
