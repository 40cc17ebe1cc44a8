"""FFSD's deep-to-shallow transform; see README.md beside this file."""
