"""The model that the server tests serve."""

from __future__ import annotations

import pytest
from helpers import tokenizer_folders
from helpers.model_folders import save, small_model

from data_prep.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("served")
    tokenizer = load_tokenizer(tokenizer_folders.byte_level(place / "tokenizer"))
    return save(small_model("sllm", tokenizer), place / "tiny", tokenizer)
