"""The report of a run: `load` reads the run folder, `tables` and the figures show it, `page` puts the page together."""
