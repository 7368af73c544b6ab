"""Text from any model that predicts a sentence at a time; knows the model by a Protocol only."""
