"""SentenceVAE, SLLM, token-level model; building, loading, saving, counting their operations.

`factory` builds and loads any of them. Families of backbones: `backbone`, with their recipe keys in
`pipeline.config.model_recipe`.
"""
