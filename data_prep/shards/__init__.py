"""The shard format: write, read, verify, split, stage, describe."""
