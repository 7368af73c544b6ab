"""The acceptance of one GPU: ordered checks with time limits, what they need there, and what arithmetic expects."""
