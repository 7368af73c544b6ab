"""From what the user names to clean documents."""
