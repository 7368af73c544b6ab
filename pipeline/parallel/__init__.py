"""Which process am I, and do all processes agree."""
