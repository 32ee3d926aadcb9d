"""Reads sweeps: the table of cells, the surface score(R, alpha), recommendations and plots."""
