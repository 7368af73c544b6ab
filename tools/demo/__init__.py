"""The demo: every step of a small project, and a report."""
