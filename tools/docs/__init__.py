"""Tables and pictures of docs/, made from docs/results."""
