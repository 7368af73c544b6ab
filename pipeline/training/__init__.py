"""One training run, step by step.

`main` has the loop, `run` one run's state, `engine` the step: forward, backward and the division of the loss
by its targets. A stop signal (`pipeline.parallel.signals`) ends the loop in `main` after a save.
"""
