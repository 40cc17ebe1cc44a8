"""Convolutions of several networks side by side in one launch; see README.md beside this file."""
