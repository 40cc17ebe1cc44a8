"""Distance of a weighted sum of maps from another map; see README.md beside this file."""
