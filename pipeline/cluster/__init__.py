"""Is every machine of this job fit to train."""
