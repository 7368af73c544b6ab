"""The acceptance of one GPU: checks with time limits, what they need there, what arithmetic expects."""
