"""Faults to plant one at a time, one YAML file per area: do the tests notice?"""
