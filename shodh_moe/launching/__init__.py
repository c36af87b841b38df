"""Starting ranks and other processes, here and on other hosts, and ending them in good order."""
