"""The fusion head over a concatenation that is never asked for; see README.md beside this file."""
