"""Errors, files, progress and command-line arguments: every folder may use this one, and it imports no other."""
