"""What a run is: recipes and DeepSpeed configs, checked before torch is loaded.

`schema` has every key of a recipe, `model_recipe` those of the models and their families.
"""
