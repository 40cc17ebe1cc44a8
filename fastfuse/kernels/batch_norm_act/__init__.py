"""Batch norm, residual sum and ReLU of stacked networks; see README.md beside this file."""
