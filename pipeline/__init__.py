"""Sentence shards → SentenceVAE → SLLM: models, training, evaluation and generation.

`from pipeline import SLLM` (or any name below) also makes Hugging Face's `AutoConfig` and `AutoModel` know
our model folders. The names are imported when they are first used: `import pipeline` alone loads neither
torch nor transformers, so that a wrong recipe key is refused within a second.
"""

import importlib

from data_prep import __version__ as __version__

_HOMES = {
    "SentenceVAE": "pipeline.models.sentence_vae",
    "SentenceVAEConfig": "pipeline.models.sentence_vae",
    "SLLM": "pipeline.models.sllm",
    "SLLMConfig": "pipeline.models.sllm",
    "load_model": "pipeline.models.factory",
    "generate": "pipeline.generation.api",
    "generate_many": "pipeline.generation.api",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name].startswith("pipeline.models"):
        importlib.import_module("pipeline.models.sllm")  # registers both model types, whichever is asked for
    return getattr(importlib.import_module(_HOMES[name]), name)
