"""What a run is: recipes and DeepSpeed configs, checked before torch is loaded."""
