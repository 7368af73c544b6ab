"""From shards to the batches of one step, in a fixed order."""
