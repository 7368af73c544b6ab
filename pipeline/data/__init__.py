"""From shards to the batches of one step, in a fixed order.

`plan` orders the bins for all ranks; `loader` (`assign`) decides which of them a rank reads.
"""
