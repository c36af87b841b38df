"""A trained model in use: load it, roll it out, predict, decode, export."""
