"""Code that several benchmark scripts share."""
