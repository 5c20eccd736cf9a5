"""Tiles to texts: one protocol, several back ends, and the rules by which sentences are kept."""
