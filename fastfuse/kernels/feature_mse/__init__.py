"""Plain squared distance of several students' maps from a target; see README.md beside this file."""
