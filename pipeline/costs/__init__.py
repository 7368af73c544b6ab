"""What a model costs before and while it trains or writes: operations, memory, speed."""
