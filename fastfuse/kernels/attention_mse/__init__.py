"""Distance of L2-normalised attention maps; see README.md beside this file."""
