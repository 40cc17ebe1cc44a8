"""Cross-entropy and temperature KL of all heads of a step; see README.md beside this file."""
