"""Test whether joint training harms a domain and whether a mixture of experts prevents it."""
