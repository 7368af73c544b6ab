"""`data-prep shard`: who does which unit of work, and how a set gets finished."""
