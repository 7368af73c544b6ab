"""Small real tokenizers for tests: each function fills a folder that `load_tokenizer` can read."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep.text.tokenizer import train_sentencepiece

ENGLISH = (
    "It was a bright cold day in April, and the clocks were striking thirteen. “Well,” said the engineer, "
    # words: quoted
    "“how many pieces can a sentence have?” Nobody knew; at 3.14 % of the price, Dr. Smith would not guess.\n"
    "The second paragraph speaks of numbers, of letters, and of the sea. It ends here…\n"
)
CHINESE = "第二天早上，他们又来到海边。“你看，”他说，“今天没有风！”大家都笑了；谁也不知道为什么。\n"
LINES = [line for i in range(60) for line in (ENGLISH + CHINESE + f"Line {i}, part {i * 7}.").split("\n")]

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def byte_level(folder: Path, vocab_size: int = 700, lowercase: bool = False) -> Path:
    """A byte-level BPE as OPT's; `lowercase` makes one that loses text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    return write_json(folder, tokenizer)


def word_piece(folder: Path) -> Path:
    """A tokenizer that does not work on bytes."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return write_json(folder, tokenizer)


def tails_and_heads(folder: Path) -> Path:
    """A byte-level BPE that joins the end of é to the start of the next: a row of é has no place to cut."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet + ["©Ã"])}  # é is C3 A9: "Ã", "©"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("©", "Ã")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return write_json(folder, tokenizer)


def apostrophe(folder: Path) -> Path:
    """A byte-level BPE as OPT's whose only merge is "'s"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet + ["'s"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("'", "s")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return write_json(folder, tokenizer)


def write_json(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "</s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def sentence_piece(folder: Path, vocab_size: int = 600) -> Path:
    """A tokenizer from `data-prep tokenizer`."""
    train_sentencepiece(LINES, folder, vocab_size)
    return folder


def llama_like(folder: Path, entries: int = 70_000) -> Path:
    """Byte-level as in Llama 3: its split, `ignore_merges`, special tokens above the vocabulary; large."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
    return _split_by_regex(folder, split, entries, special, plain=[], ignore_merges=True)


def qwen_like(folder: Path, nfc: bool = False) -> Path:
    """Byte-level as in Qwen: single digits, added tokens that are plain text; `nfc` as published."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _split_by_regex(folder, split, 3000, special, plain=["<tool_call>", "</tool_call>"], nfc=nfc)


def _split_by_regex(
    folder: Path,
    split: str,
    entries: int,
    special: list[str],
    plain: list[str],
    ignore_merges: bool = False,
    nfc: bool = False,
) -> Path:
    """A vocabulary of `entries`: bytes, trained entries, then synthetic ones."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(LINES, trainer)
    model = json.loads(learned.to_str())["model"]
    vocabulary, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    letters = [c for c in alphabet if c.isascii() and c.isalpha()]
    pairs = (
        (left, right) for left in [*letters, *(a + b for a in letters for b in letters)] for right in letters
    )
    for left, right in pairs:
        if len(vocabulary) == entries:
            break
        if left in vocabulary and left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    write_json(folder, tokenizer)
    config = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
