"""What every room of the package may use, and what imports none of them: errors, files, progress, arguments."""
