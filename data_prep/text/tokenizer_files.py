"""The files of a tokenizer's folder, before they make a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.common.errors import UserError

CONFIG_FILE = "tokenizer_config.json"
END_SYMBOLS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")  # where no file names one


def read_config(folder: Path, name: str = CONFIG_FILE) -> dict:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a JSON object")
    return config


def convert_slow_files(folder: Path) -> bytes:
    """`tokenizer.json` for a folder that has only vocab.json and merges.txt."""
    if not (folder / "config.json").is_file() and "tokenizer_class" not in read_config(folder):
        return _byte_level_definition(folder)
    from transformers import AutoTokenizer

    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return fast.backend_tokenizer.to_str().encode("utf-8")
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"tokenizer folder {folder} cannot be read: {error}") from error


def _byte_level_definition(folder: Path) -> bytes:
    """GPT-2's tokenizer with the vocabulary of a folder that names no class."""
    from tokenizers import AddedToken
    from tokenizers.implementations import ByteLevelBPETokenizer

    try:
        tokenizer = ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the Rust side raises bare Exceptions
        raise UserError(f"tokenizer folder {folder} cannot be read: {error}") from error
    known = filter(tokenizer.get_vocab().__contains__, END_SYMBOLS)
    tokenizer.add_special_tokens([AddedToken(symbol, normalized=False) for symbol in known])
    return tokenizer.to_str().encode("utf-8")
