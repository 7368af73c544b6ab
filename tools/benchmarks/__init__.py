"""Measurements that are no user command."""
