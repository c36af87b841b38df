"""Starting ranks and other processes, on this and other hosts, and stopping them cleanly."""
