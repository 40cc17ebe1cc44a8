"""Networks trained to the end of their recipes, in as many calls as it takes."""
