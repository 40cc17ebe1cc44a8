"""Temperature KL between feature maps, over positions or channels; see README.md beside this file."""
