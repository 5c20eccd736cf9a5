"""Coordinate systems and tile schemes. Plain numpy: no Ray, no torch."""
