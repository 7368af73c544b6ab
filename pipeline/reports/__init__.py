"""Figures of runs as a page."""
