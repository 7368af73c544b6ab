"""From a run to a model folder with a model card."""
