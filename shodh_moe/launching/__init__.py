"""Start ranks and other processes on this host and others, and end them cleanly."""
