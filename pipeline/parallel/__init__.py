"""Which process am I, and do all processes agree.

`signals` handles USR1 and TERM; `ranks` reads the launcher; `agreement` and `reduction` are collectives.
"""
