"""Coordinate systems, tile schemes, footprints, and means and sums of rasters over them. No Ray, no torch, no files."""
