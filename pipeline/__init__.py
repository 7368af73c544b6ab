"""Sentence shards → SentenceVAE → SLLM: models, training, evaluation and generation.

`from pipeline import SLLM` (or any name below) registers our model folders with Hugging Face's `AutoConfig`,
`AutoModel` and `AutoModelForCausalLM` (`pipeline.interop`). Names are imported at first use, so `import
pipeline` alone loads neither torch nor transformers, so that a wrong recipe key is refused within a second.
"""

import importlib
from typing import Any

from data_prep import __version__ as __version__

_HOMES = {
    "SentenceVAE": "pipeline.models.sentence_vae",
    "SentenceVAEConfig": "pipeline.models.sentence_vae",
    "SLLM": "pipeline.models.sllm",
    "SLLMConfig": "pipeline.models.sllm",
    "StackLM": "pipeline.models.stack",
    "StackConfig": "pipeline.models.stack",
    "AnchorLM": "pipeline.models.anchor_lm",
    "AnchorConfig": "pipeline.models.anchor_lm",
    "load_model": "pipeline.models.factory",
    "generate": "pipeline.generation.api",
    "generate_many": "pipeline.generation.api",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name].startswith("pipeline.models"):
        # Registers our model types, whichever name was asked for.
        importlib.import_module("pipeline.interop")
        importlib.import_module("pipeline.models.anchor_lm")
    return getattr(importlib.import_module(_HOMES[name]), name)
