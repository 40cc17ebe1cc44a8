"""Modules that hold the parameters of the fusion head, trans-fusion, the deep-to-shallow transform and connectors."""
