"""A prompt as the model sees it: complete sentences and an unfinished one."""

from __future__ import annotations

import numpy as np

from data_prep.common.errors import UserError, counted
from data_prep.common.language import detect_language
from data_prep.text.running_ends import RunningEnds
from data_prep.text.sentences import SentenceSettings, cut_document
from data_prep.text.tokenizer import LossyTokenization, Tokenizer

_LOSSY = "the model's tokenizer cannot give this prompt back: change its unusual characters"


class WholeDocument:
    """The rule of a token-level model: a document is one sentence. `most`: symbols of a document, with its
    start."""

    def __init__(self, most: int):
        self.most = most

    def cut(self, tokens_T: np.ndarray) -> np.ndarray:
        """A prompt is a sentence that has ended. Raises: UserError if nothing can follow it."""
        if len(tokens_T) >= self.most:
            raise UserError(
                f"the prompt has {counted(len(tokens_T), 'token')}, but the model has positions for "
                f"{self.most - 1}: shorten the prompt"
            )
        return np.asarray([len(tokens_T), 0])

    def before(self, tokens: list[int], symbol: int) -> bool:
        return False


def split_by_rule(
    prompt: str, tokenizer: Tokenizer, rule: RunningEnds | WholeDocument
) -> tuple[list[list[int]], list[int]]:
    """The same for ends by rule: the last sentence ends with the token behind it, which is not there yet."""
    try:
        tokens_T = tokenizer.encode_exactly(prompt, prompt.encode())
    except LossyTokenization:
        raise UserError(_LOSSY) from None
    *sentences, tail = (part.tolist() for part in np.split(tokens_T, np.cumsum(rule.cut(tokens_T))[:-1]))
    return sentences, tail


def split_prompt(prompt: str, tokenizer: Tokenizer, settings: dict) -> tuple[list[list[int]], list[int]]:
    """Cut a prompt as training cuts a document: (complete sentences, tokens of the unfinished last one).

    `settings`: segmenter, language and max_tokens of the model. White space at the end belongs to the next
    sentence. A last sentence at the token limit is complete: training would cut it there.
    """
    if not prompt:
        return [], []
    cut = SentenceSettings(**settings)
    segmenter = cut.segmenter_for(detect_language(prompt))
    try:
        tokens_T, lengths_S = cut_document(prompt, tokenizer, segmenter, cut)
    except LossyTokenization:
        raise UserError(_LOSSY) from None
    *sentences, tail = (part.tolist() for part in np.split(tokens_T, np.cumsum(lengths_S)[:-1]))
    if segmenter.is_complete(prompt):
        space = len(prompt.encode()) - len(prompt.rstrip().encode())
        spaces_from_end = np.cumsum(tokenizer.byte_lengths[tail[::-1]])
        complete = len(tail) - int(np.searchsorted(spaces_from_end, space, side="right"))
        sentences, tail = [*sentences, tail[:complete]], tail[complete:]
    if len(tail) >= cut.max_tokens:
        sentences, tail = [*sentences, tail], []
    return [sentence for sentence in sentences if sentence], tail
