"""Errors for the user, atomic files, remote storage, the environment of a result."""
