"""One-off studies behind the pages in docs/."""
