"""Texts and token ids: what Hugging Face's and the harness's callers give, as our models read it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_prep.common.errors import UserError
from data_prep.common.language import detect_language
from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer


def cut_text(text: str, tokenizer: Tokenizer, cut: SentenceSettings) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] and sentence lengths [S] of a text, cut as a document of training.

    Raises: UserError for a text that the tokenizer cannot give back.
    """
    try:
        return cut_document(text, tokenizer, cut.segmenter_for(detect_language(text)), cut)
    except LossyTokenization:
        raise UserError(
            "the model's tokenizer cannot give a text back: change its unusual characters"
        ) from None


def unpadded(rows_RL: Tensor, mask_RL: Tensor | None) -> list[Tensor]:
    masks = torch.ones_like(rows_RL) if mask_RL is None else mask_RL
    return [row[mask.bool()] for row, mask in zip(rows_RL, masks, strict=True)]


def decode_ids(ids: Tensor, where: str, tokenizer: Tokenizer) -> str:
    """The text of ids, which may follow control symbols.

    Raises: UserError for control symbols inside the text and for parts of characters.
    """
    numbers = ids.cpu().numpy()
    if (wrong := numbers[(numbers < 0) | (numbers >= tokenizer.vocab_size)]).size:
        raise UserError(f"{where}: {wrong[0]} is no id of the tokenizer, which has {tokenizer.vocab_size}")
    has_text = tokenizer.byte_lengths[numbers] > 0
    first = int(has_text.argmax()) if has_text.any() else len(numbers)
    if not has_text[first:].all():
        place = first + int(has_text[first:].argmin())
        raise UserError(
            f"{where}: control symbol {numbers[place]} at place {place}, inside the text: give one "
            "unfinished document, and an attention_mask of 0 where it is padded"
        )
    try:
        return tokenizer.decode_bytes(numbers[first:]).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: begins or ends inside a character: give all of its ids") from None


def spell(data: bytes, tokenizer: Tokenizer) -> list[int]:
    """Token ids for bytes, which may be a part of a character."""
    try:
        return tokenizer.encode(data.decode("utf-8")).tolist()
    except UnicodeDecodeError:
        single = {
            tokenizer.decode_bytes([i]): i for i in np.flatnonzero(tokenizer.byte_lengths == 1).tolist()
        }
        return [single[bytes([byte])] for byte in data]
