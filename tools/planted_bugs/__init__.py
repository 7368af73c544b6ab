"""Faults to plant one at a time, one YAML file per area, to see whether the tests notice."""
