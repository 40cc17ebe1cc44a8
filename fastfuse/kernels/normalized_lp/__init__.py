"""Distance of L2-normalised maps, p = 1 or 2; see README.md beside this file."""
