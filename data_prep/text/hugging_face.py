"""A tokenizer as Hugging Face's `AutoTokenizer` loads it: tokenizer.json and tokenizer_config.json.

Its ids are those of `Tokenizer.encode`, behind the start symbol, as every model is trained. "</s>" in a text
is text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.common.files import write_atomically
from data_prep.text.tokenizer import SPACE_MARK, SentencePieceTokenizer, Tokenizer
from data_prep.text.tokenizer_files import CONFIG_FILE


def write_hugging_face(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write both files to an existing folder."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers.processors import TemplateProcessing

    if isinstance(tokenizer, SentencePieceTokenizer):
        rust = RustTokenizer.from_str(json.dumps(_sentencepiece_definition(tokenizer)))
    else:
        rust = RustTokenizer.from_str(tokenizer._definition.decode("utf-8"))
        rust.no_truncation()
        rust.no_padding()
    bos, eos, pad = (rust.id_to_token(i) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    rust.post_processor = TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokenizer.bos_id)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "padding_side": "left",  # batches of prompts end where the new ids begin
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    for name, content in (("tokenizer.json", rust.to_str(pretty=True)), (CONFIG_FILE, text)):
        write_atomically(Path(folder, name), content.encode("utf-8"))


def _sentencepiece_definition(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """A byte-pair SentencePiece model as a `tokenizers` BPE.

    SentencePiece joins the neighbours whose piece has the lowest id first; the order of merges says the same.
    Pieces hold plain spaces here, so that the space mark in a text is no piece and falls back to bytes.
    """
    processor = tokenizer._processor
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    plain = {
        piece.replace(SPACE_MARK, " "): index
        for index, piece in enumerate(pieces)
        if not (processor.is_byte(index) or processor.is_control(index) or processor.is_unknown(index))
    }
    controls = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    merges = [
        [piece[:at], piece[at:]]
        for piece in sorted(plain, key=lambda piece: -processor.get_score(plain[piece]))
        for at in range(1, len(piece))
        if piece[:at] in plain and piece[at:] in plain
    ]
    unknown = pieces[processor.unk_id()]
    named = {piece: index for index, piece in enumerate(pieces) if index not in plain.values()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": pieces[index], **flags} for index in controls],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "byte_fallback": True,
            "fuse_unk": True,
            "vocab": {**named, **plain},
            "merges": merges,
        },
    }
