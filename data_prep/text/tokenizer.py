"""Exact tokenizers: `decode(encode(text)) == text` for every text, or the tokenizer is refused.

A tokenizer is a local Hugging Face folder whose `tokenizer.json` works on bytes (OPT, GPT-2, Llama 3, …), or
one made by `train_sentencepiece` (`tokenizer.model`). Both use a table of the bytes that each token adds to
the text: decoding joins them, and the sentence cutter turns them into offsets. No BOS or EOS is added here,
and `</s>` in a text stays plain text.

Hugging Face `tokenizers` and SentencePiece define the ids; where gigatoken is proven to give the same ids it
encodes, 20 to 50 times as fast (`fast_encoder`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.errors import UserError, counted, in_thread, log
from data_prep.common.files import write_atomically
from data_prep.text.fast_encoder import FastEncoder, fast_encoder, unproven
from data_prep.text.tokenizer_files import CONFIG_FILE, END_SYMBOLS, convert_slow_files, read_config

# What `AutoTokenizer` may read beside tokenizer.json; copied with it, not part of the fingerprint.
COMPANION_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
SPACE_MARK = "\u2581"  # SentencePiece's mark for a space
LINE_CHARACTERS = 2000  # training lines are cut here, so that SentencePiece's limit drops none


class LossyTokenization(ValueError):
    """The tokens of one text do not decode to that text."""


class Tokenizer:
    """Exact tokenizer.

    vocab_size: embedding rows needed, the highest id + 1.
    bos_id, eos_id, pad_id: control symbols; never produced by `encode`.
    fingerprint: sha256 (hex) over the definition of the ids.
    engine: the library that encodes, with its version; the ids do not depend on it.
    byte_lengths: int32 [vocab_size], UTF-8 bytes each token adds to the text, 0 for control symbols.
    strips: whether added tokens take the white space beside them (`advice` names them).
    """

    kind: str
    reference: str  # the package that defines the ids
    definition_file: str
    _definition: bytes
    _config: dict
    strips = False
    advice = "use a byte-level tokenizer or train one with `data-prep tokenizer`"  # when it loses text

    def __init__(
        self, folder: Path, table: list[bytes], bos_id: int, eos_id: int, pad_id: int, fingerprint: str
    ):
        self.folder = folder
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.fingerprint = fingerprint
        self.vocab_size = len(table)
        self.byte_lengths = np.array([len(piece) for piece in table], dtype=np.int32)
        self._table = table
        self._pieces = np.empty(len(table), dtype=object)
        self._pieces[:] = table
        self._fast: FastEncoder | None = None
        self._fast_decodes = False

    @property
    def engine(self) -> str:
        return self._fast.name if self._fast else self.reference_name

    @property
    def reference_name(self) -> str:
        """The library that defines the ids, with its version."""
        return f"{self.reference} {version(self.reference)}"

    def __reduce__(self) -> tuple:
        """Pickled by path: a worker process loads the tokenizer again."""
        return load_tokenizer, (self.folder.absolute(),)

    def encode(self, text: str) -> np.ndarray:
        """uint32 [T] token ids of `text`, without BOS or EOS.

        Raises:
            UserError: a regular comparison found wrong ids of the fast engine.
        """
        return self._fast.encode(text) if self._fast else self.encode_reference(text)

    def encode_reference(self, text: str) -> np.ndarray:
        """The same ids from the library that defines them; slow."""
        raise NotImplementedError

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One `encode` result per text."""
        return [self.encode(text) for text in texts]

    def encode_exactly(self, text: str, data: bytes) -> np.ndarray:
        """`encode`, checked: `data` is the text in UTF-8. Raises `LossyTokenization` when bytes are lost."""
        tokens = self.encode(text)
        # gigatoken joins the bytes twice as fast, where its table is the same.
        back = self._fast.decode(tokens) if self._fast_decodes else self.decode_bytes(tokens)
        if back != data or not self.byte_lengths[tokens].all():
            raise LossyTokenization("the tokens do not decode to the text")
        return tokens

    def decode_bytes(self, tokens: np.ndarray | Iterable[int]) -> bytes:
        """The UTF-8 bytes of `tokens`; control symbols add none."""
        if isinstance(tokens, np.ndarray):
            return b"".join(self._pieces.take(tokens).tolist())
        return b"".join(map(self._table.__getitem__, tokens))

    def decode(self, tokens: np.ndarray | Iterable[int]) -> str:
        """The text of `tokens`; an unfinished character at an end becomes U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write the defining files to `folder`; `load_tokenizer(folder)` loads the same tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / self.definition_file, self._definition)
        config = json.dumps(self._config, indent=2, sort_keys=True) + "\n"
        write_atomically(folder / CONFIG_FILE, config.encode())

    def _find_fast_engine(
        self, build: Callable[[], Any], reference: Callable[[str], np.ndarray], added: list[str]
    ) -> None:
        self._fast = fast_encoder(build, reference, self.reference_name, added)
        self._fast_decodes = self._fast is not None and self._fast.same_bytes(self._table)


class ByteLevelTokenizer(Tokenizer):
    """A byte-level `tokenizer.json` (Hugging Face `tokenizers`)."""

    kind = "byte-level"
    reference = "tokenizers"
    definition_file = "tokenizer.json"

    def __init__(self, folder: Path, definition: bytes, config: dict):
        # The Rust thread pool does not survive a fork and competes with our worker processes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as RustTokenizer

        try:
            spec = json.loads(definition)
            if (spec.get("model") or {}).get("dropout"):
                # The same text would have other ids each time. The copy in the shards goes without.
                if parent_process() is None:
                    log(
                        f"data-prep: tokenizer {folder} sets BPE dropout {spec['model']['dropout']}: off here"
                    )
                spec["model"]["dropout"] = None
                definition = json.dumps(spec, ensure_ascii=False, indent=2).encode("utf-8")
            self._rust = RustTokenizer.from_str(definition.decode("utf-8"))
        except Exception as error:  # the Rust side raises bare Exceptions
            raise UserError(f"{folder}/tokenizer.json is not a tokenizer definition: {error}") from error
        if not _has_byte_level(spec):
            raise UserError(
                f"tokenizer {folder} does not work on bytes, so it cannot decode to every text; "
                "use a byte-level one (OPT's, GPT-2's) or train one with `data-prep tokenizer`"
            )
        self._rust.encode_special_tokens = True  # "</s>" in a text is text
        self._rust.no_truncation()
        self._rust.no_padding()
        table = _byte_level_table(self._rust, spec)
        if (eos := self._special_id(config, "eos_token")) is None:
            config = self._with_symbols(config, folder, table)
            eos = self._special_id(config, "eos_token")
        bos, pad = self._special_id(config, "bos_token"), self._special_id(config, "pad_token")
        bos, pad = (eos if bos is None else bos), (eos if pad is None else pad)
        self._definition, self._config = definition, config
        fingerprint = hashlib.sha256(definition + f"\0{bos},{eos},{pad}".encode()).hexdigest()
        super().__init__(folder, table, bos, eos, pad, fingerprint)
        tokens = self._rust.get_added_tokens_decoder().values()
        added = [token.content for token in tokens]
        if stripping := [token.content for token in tokens if token.lstrip or token.rstrip]:
            self.strips = True
            names = ", ".join(stripping[:3])
            self.advice = f"its added tokens {names} strip white space: set lstrip, rstrip to false in a copy"
        elif (normalizer := spec.get("normalizer")) is not None:
            names = ", ".join(step["type"] for step in normalizer.get("normalizers", [normalizer]))
            self.advice = (
                f'its tokenizer.json changes text first ({names}): set "normalizer" to null in a copy of it; '
                "text that is in that form already keeps its ids"
            )
        # gigatoken has no option to read "</s>" in a text as text, so the special tokens are removed.
        spec["added_tokens"] = [token for token in spec.get("added_tokens") or [] if not token["special"]]
        spec["post_processor"] = None
        plain = json.dumps(spec).encode("ascii")
        reason = unproven(spec)
        del spec  # ten times the file's size, before the next engine is built

        def build() -> Any:
            if reason:
                raise UserError(reason)
            return _gigatoken(plain)

        self._find_fast_engine(build, self.encode_reference, added)

    def _with_symbols(self, config: dict, folder: Path, table: list[bytes]) -> dict:
        """`config` with an end symbol, which it does not name. Raises `UserError` when there is none."""
        named = read_config(folder, COMPANION_FILES[0])
        config |= {
            key: named[key]
            for key in ("bos_token", "eos_token", "pad_token")
            if self._special_id(named, key) is not None
        }
        if config.get("eos_token") is None:  # as in GPT-2's own folder
            for symbol in END_SYMBOLS:
                index = self._rust.token_to_id(symbol)
                if index is not None and not table[index]:  # no text gives it
                    return config | {"eos_token": symbol}
        if self._special_id(config, "eos_token") is None:
            raise UserError(
                f"tokenizer {folder} names no end symbol: set eos_token in {CONFIG_FILE} to one of its tokens"
            )
        return config

    def _special_id(self, config: dict, name: str) -> int | None:
        entry = config.get(name)
        content = entry.get("content") if isinstance(entry, dict) else entry
        return self._rust.token_to_id(content) if isinstance(content, str) else None

    def encode_reference(self, text: str) -> np.ndarray:
        encoding = self._rust.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=np.uint32)

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        for name in COMPANION_FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != Path(folder).resolve():
                write_atomically(Path(folder, name), (self.folder / name).read_bytes())


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` made by `train_sentencepiece`."""

    kind = "sentencepiece"
    reference = "sentencepiece"
    definition_file = "tokenizer.model"

    def __init__(self, folder: Path, model: bytes, config: dict):
        import sentencepiece

        try:
            self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{folder}/tokenizer.model is not a SentencePiece model: {error}") from error
        table = [_sentencepiece_bytes(processor, index) for index in range(processor.get_piece_size())]
        bos, eos, pad = processor.bos_id(), processor.eos_id(), processor.pad_id()
        if min(bos, eos, pad) < 0:
            raise UserError(
                f"{folder}/tokenizer.model lacks <s>, </s> or <pad>; train one with `data-prep tokenizer`"
            )
        # SentencePiece cannot distinguish its space mark from a space, so the mark is encoded as bytes here.
        self._mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if processor.unk_id() in self._mark:
            raise UserError(
                f"{folder}/tokenizer.model has no byte pieces, so it cannot decode to every text; "
                "train one with `data-prep tokenizer`"
            )
        self._definition, self._config = model, config
        super().__init__(folder, table, bos, eos, pad, hashlib.sha256(model).hexdigest())
        controls = [processor.id_to_piece(index) for index in (bos, eos, pad, processor.unk_id())]
        self._find_fast_engine(lambda: _gigatoken(_as_json(model)), self._encode_part, controls)

    def encode(self, text: str) -> np.ndarray:
        return self._around_marks(text, super().encode)

    def encode_reference(self, text: str) -> np.ndarray:
        return self._around_marks(text, self._encode_part)

    def _around_marks(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        if SPACE_MARK not in text:
            return encode(text)
        first, *others = text.split(SPACE_MARK)
        mark = np.array(self._mark, dtype=np.uint32)
        return np.concatenate([encode(first), *(ids for part in others for ids in (mark, encode(part)))])

    def _encode_part(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), dtype=np.uint32)


def _gigatoken(definition: bytes) -> Any:
    from gigatoken import Tokenizer as Gigatoken

    return Gigatoken.from_json(definition).backend


def _as_json(model: bytes) -> bytes:
    """A SentencePiece model as JSON by gigatoken's reader, without the control symbols."""
    # A private module: the reason for the pinned minor version.
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    spec = json.loads(sentencepiece_to_tokenizer_json(model))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    return json.dumps(spec).encode("ascii")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a local folder and check that it is lossless.

    Raises:
        UserError: the folder is missing, holds no tokenizer, or fails the round trip.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist")
    config = read_config(folder)
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        model = (folder / "tokenizer.model").read_bytes()
        tokenizer: Tokenizer = SentencePieceTokenizer(folder, model, config)
    elif (folder / "tokenizer.json").is_file():
        tokenizer = ByteLevelTokenizer(folder, (folder / "tokenizer.json").read_bytes(), config)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = ByteLevelTokenizer(folder, convert_slow_files(folder), config)
    else:
        raise UserError(
            f"tokenizer folder {folder} holds no tokenizer: expected tokenizer.json, tokenizer.model, "
            "or vocab.json with merges.txt"
        )
    _probe(tokenizer)
    return tokenizer


def train_sentencepiece(lines: Iterable[str], folder: str | Path, vocab_size: int) -> Tokenizer:
    """Train a byte-pair SentencePiece model on `lines` of text and write it to `folder`.

    Byte fallback, identity normalisation, no dummy prefix, white space kept: any text round-trips. Ids: `<s>`
    0, `<pad>` 1, `</s>` 2, `<unk>` 3, line feed 4, then 256 bytes. The same lines give the same bytes.

    Raises:
        UserError: `vocab_size` does not fit the sample.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        train = partial(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=_training_lines(lines),
            model_writer=model,
            model_type="bpe",  # trains in seconds; unigram takes a minute on Chinese for 1–3 % fewer tokens
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            required_chars=SPACE_MARK,  # otherwise a sample without spaces has no piece for the space
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            shuffle_input_sentence=False,
            max_sentence_length=16 * LINE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
        in_thread(train)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).split("] ")[-1].strip()  # without SentencePiece's source line and condition
        raise UserError(
            f"cannot train {counted(vocab_size, 'token')} on this sample: {reason} "
            "Choose another --vocab-size or give more text"
        ) from error
    got = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    if got != vocab_size:
        raise UserError(
            f"the sample gives only {counted(got, 'token')}, not {vocab_size:,}: "
            "give more text or lower --vocab-size"
        )
    config = {"tokenizer_type": "sentencepiece", "vocab_size": vocab_size}
    SentencePieceTokenizer(Path(folder), model.getvalue(), config).save(folder)
    return load_tokenizer(folder)


def _training_lines(lines: Iterable[str]) -> Iterable[str]:
    """Parts of lines that SentencePiece accepts: it drops long lines and those with these characters."""
    for line in lines:
        for part in re.split("[\n\t\0\u2581\u2585]", line):
            for start in range(0, len(part), LINE_CHARACTERS):
                yield part[start : start + LINE_CHARACTERS]


def _has_byte_level(spec: dict) -> bool:
    decoder = spec.get("decoder") or {}
    decoders = decoder.get("decoders", [decoder])
    return any(step.get("type") == "ByteLevel" for step in decoders)


def _byte_alphabet() -> dict[str, int]:
    """The character for each byte in byte-level vocabularies (GPT-2's published mapping).

    Printable Latin-1 characters map to themselves, the other bytes to the code points from 256 up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_table(rust: Any, spec: dict) -> list[bytes]:
    """Bytes of each id. Entries that no text produces (`<unk>`, `madeupword0000`) are control symbols."""
    alphabet = _byte_alphabet()
    to_latin = defaultdict(lambda: 0xFFFF, {ord(c): byte for c, byte in alphabet.items()})
    model = spec.get("model", {})
    merges = model.get("merges", [])
    reachable = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1) for merge in merges}
    every = model.get("type") != "BPE" or model.get("ignore_merges", False)
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):  # slow: the library takes longer than all the rest
        vocabulary = rust.get_vocab(with_added_tokens=False)
    added_tokens = rust.get_added_tokens_decoder()
    table = [b""] * (max([*vocabulary.values(), *added_tokens]) + 1)
    for token, index in vocabulary.items():
        if every or len(token) == 1 or token in reachable:
            spelled = token.translate(to_latin)
            table[index] = b"" if "\uffff" in spelled else spelled.encode("latin-1")
    for index, added in added_tokens.items():
        table[index] = b"" if added.special else added.content.encode("utf-8")
    return table


def _sentencepiece_bytes(processor: Any, index: int) -> bytes:
    if processor.is_control(index) or processor.is_unknown(index):
        return b""
    piece = processor.id_to_piece(index)
    if processor.is_byte(index):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8")


def _probe(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that loses text. Raises `UserError` naming the first text that failed."""
    # Together these contain every byte that UTF-8 can contain.
    every_byte = "".join(
        map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x4000)])
    )
    symbols = [tokenizer._table[i].decode("utf-8", "replace") for i in range(min(8, tokenizer.vocab_size))]
    for text in (
        "Plain words, and  two   spaces ",
        " \t\r\n\n x\n",
        "don 't do that . I 'm sure , yes !",  # clean-up of spaces
        "e\u0301 \uff21\uff22 \u2460 \ufb01",  # normalisation
        "\u2581a \u2581\u2581 \u2585",
        "\0 \ufeff \ufffd \ue000 \U0010ffff",
        "<s></s><pad><unk><mask> <0x0A> <|endoftext|> [UNK] madeupword0000",
        "第三天，他说：“好。”\u3000然后……",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
        every_byte,
        " ".join(symbols),
    ):
        data = text.encode("utf-8")
        try:
            tokenizer.encode_exactly(text, data)
        except LossyTokenization:
            back = tokenizer.decode(tokenizer.encode(text))
            raise UserError(
                f"tokenizer {tokenizer.folder} loses text: {text[:60]!r} comes back as {back[:60]!r}; "
                f"{tokenizer.advice}"
            ) from None
