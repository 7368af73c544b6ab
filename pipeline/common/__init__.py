"""Text of numbers for people; nothing that knows a model or a file."""
