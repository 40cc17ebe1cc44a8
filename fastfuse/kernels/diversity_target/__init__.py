"""The shifted attention target of FFSD's diversity loss; see README.md beside this file."""
