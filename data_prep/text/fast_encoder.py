"""gigatoken, a fast encoder: used only where its ids are proven equal to the reference library's.

The reference (Hugging Face `tokenizers` or SentencePiece) defines the ids. At start a fixed sample must give
equal ids; later the ids of every `COMPARE_EVERY`-th text, of a long one those of a part of it, are compared,
and a difference ends the run. Texts with letters or digits newer than Unicode 14 go to the reference, because
the libraries' tables differ in age.

gigatoken keeps every word it has seen: 0.1 MB per MB of English books, 4 MB per MB of random words. When the
process has grown too much, the engine is rebuilt in about 0.1 s.

`DATA_PREP_TOKENIZER=hf` in the environment disables it.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from multiprocessing import parent_process
from typing import Any

import numpy as np

from data_prep.common.errors import UserError, first_line

SWITCH = "DATA_PREP_TOKENIZER"
COMPARE_EVERY = 200  # texts
COMPARE_MOST = 4096  # characters
# A letter before a mark or space: what is before it does not change the ids of what follows.
BORDER = re.compile(r"(?<=[^\W\d_])[^\w']")
# Check the memory after this much "cost": characters, plus 8 for every byte above one per character. A unit
# rarely adds more than 4 bytes, so memory grows by at most 40 MB between two checks.
CHECK_COST = 10_000_000
MEMORY_GROWTH = 120_000_000  # bytes above the process's size with a new engine
# Letters and digits of Unicode 15 to 17 (gigatoken 0.10 knows all, tokenizers 0.23 those up to 16); a few
# older characters in these ranges do no harm. One pattern for three bytes of UTF-8, one for four.
NEW_IN_THREE = re.compile("[\u088f\u0c5c\u0cdc\u1c89-\u1c8a\ua7cb-\ua7dc\ua7f1]")
NEW_IN_FOUR = re.compile(
    "(?=[\U00010000-\U0010ffff])["  # a quick test for all other characters
    "\U000105c0-\U000105f3\U00010940-\U00010959\U00010d40-\U00010d85\U00010ec2-\U00010ec7"
    "\U0001123f-\U00011240\U00011380-\U000113d3\U000116d0-\U000116e3\U00011bc0-\U00011bf9"
    "\U00011db0-\U00011de9\U00011f02-\U00011f59\U0001342f-\U000143fa\U00016100-\U00016139"
    "\U00016d40-\U00016d79\U00016ea0-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff"
    "\U00018cff-\U00018df2\U0001b132-\U0001b155\U0001ccf0-\U0001ccf9\U0001d2c0-\U0001d2d3"
    "\U0001df25-\U0001df2a\U0001e030-\U0001e06d\U0001e4d0-\U0001e4f9\U0001e5d0-\U0001e5fa"
    "\U0001e6c0-\U0001e6ff\U0002b739-\U0002b73f\U0002cea2-\U0002cead\U0002ebf0-\U0002ee5d"
    "\U00031350-\U00033479]"
)
# The lists cover letters (L) and numbers (N): a split that uses more is left to the reference.
CHARACTER_CLASS = re.compile(r"\\[pP]\{?\^?(\w+)")


class FastEncoder:
    """gigatoken, compared regularly with the reference. `name`: library and version."""

    def __init__(
        self,
        build: Callable[[], Any],
        reference: Callable[[str], np.ndarray],
        reference_name: str,
        check_cost: int = CHECK_COST,
        memory_growth: int = MEMORY_GROWTH,
    ):
        self.name = f"gigatoken {version('gigatoken')}"
        self._build, self._reference, self._reference_name = build, reference, reference_name
        self._check_cost, self._cost, self._texts = check_cost, 0, 0
        self._engine = build()
        self._memory_limit = _memory() + memory_growth

    def encode(self, text: str) -> np.ndarray:
        """uint32 [T] ids. Raises `UserError` when the two libraries differ for this text."""
        if self._cost > self._check_cost:
            self._cost = 0
            if not 0 < _memory() < self._memory_limit:
                self._engine = None  # free it before the next one is built
                self._engine = self._build()
        size = len(text)
        if not text.isascii():
            data = text.encode("utf-8")
            if has_new_characters(text, data):
                return self._reference(text)
            size = len(data)
        self._cost += len(text) + 8 * (size - len(text))
        # One text at a time: only gigatoken's batch calls start threads.
        tokens = self._engine.encode(text)
        self._texts += 1
        if self._texts % COMPARE_EVERY == 0 and not self._same(text, tokens):
            raise UserError(
                f"{self.name} and {self._reference_name} give different token ids for the text that "
                f"starts with {text[:60]!r}; set {SWITCH}=hf and make the shards again"
            )
        return tokens

    def _same(self, text: str, tokens: np.ndarray) -> bool:
        """Whether the reference, which is slow, gives the text, or a part of a long one, the same ids."""
        if len(text) > COMPARE_MOST:  # at another place each time
            first = BORDER.search(text, self._texts % (len(text) - COMPARE_MOST))
            last = BORDER.search(text, first.start() + COMPARE_MOST) if first else None
            if first and last:
                part = self._reference(text[first.start() : last.start()]).astype(np.uint32).tobytes()
                place = (data := tokens.tobytes()).find(part)
                while place > 0 and place % tokens.itemsize:
                    place = data.find(part, place + 1)
                if place >= 0:
                    return True
        return np.array_equal(tokens, self._reference(text))

    def decode(self, tokens: np.ndarray) -> bytes:
        """The bytes of uint32 [T] ids; only valid where `same_bytes` is true."""
        return self._engine.decode(tokens)

    def first_difference(self, added: Iterable[str]) -> str | None:
        """The start of the first sample text whose ids differ, or None. `added`: symbols a text may hold."""
        for text in sample_texts(added):
            tokens = self.encode(text)
            if tokens.dtype != np.uint32 or not np.array_equal(tokens, self._reference(text)):
                return text[:40]
        return None

    def same_bytes(self, table: list[bytes]) -> bool:
        """Whether `decode` joins the entries of `table`, also when they are partial characters."""
        ids = np.array([index for index, piece in enumerate(table) if piece], dtype=np.uint32)
        # In two orders, so that no byte can move from one token to the next unnoticed.
        return all(
            self._engine.decode(order) == b"".join(map(table.__getitem__, order.tolist()))
            for order in (ids, ids[np.argsort(ids * np.uint32(2654435769))])
        )


def fast_encoder(
    build: Callable[[], Any],
    reference: Callable[[str], np.ndarray],
    reference_name: str,
    added: Iterable[str],
) -> FastEncoder | None:
    """A proven `FastEncoder`, or None when it is disabled or, with one warning on stderr, unusable.

    Args:
        build: makes gigatoken's tokenizer; may raise anything.

    Raises:
        UserError: the environment's switch is unknown.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "auto", "hf"):
        raise UserError(f"{SWITCH}={switch} in the environment is unknown; set it to auto or hf")
    if switch == "hf":
        return None
    try:
        encoder = FastEncoder(build, reference, reference_name)
        different = encoder.first_difference(added)
        if different is None:
            return encoder
        reason = f"its ids differ for {different!r}"
    except ImportError:
        reason = "it is not installed"
    except (KeyboardInterrupt, SystemExit):
        raise
    except UserError as error:
        reason = str(error)
    except BaseException as error:  # a panic in Rust is not an Exception
        reason = first_line(error)
    if parent_process() is None:  # once, not from every worker
        print(
            f"data-prep: warning: {reference_name} encodes, slowly: gigatoken cannot be used: {reason}",
            file=sys.stderr,
        )
    return None


def has_new_characters(text: str, data: bytes) -> bool:
    """Whether `text`, in UTF-8 `data`, has a letter or digit that the libraries may classify differently."""
    three = (
        b"\xe0" in data or b"\xe1\xb2" in data or b"\xea\x9f" in data
    )  # first bytes of the three-byte ones
    if three and NEW_IN_THREE.search(text):
        return True
    return b"\xf0" in data and NEW_IN_FOUR.search(text) is not None


def _memory() -> int:
    """Bytes of memory in use by this process; 0 where it is unknown."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def unproven(spec: dict) -> str | None:
    """What in a `tokenizer.json` gigatoken might read differently, or None.

    It ignores settings that it does not know, and a sample may not show it. So only two shapes are accepted:
    `ByteLevel` alone (OPT, GPT-2), and one `Split` followed by `ByteLevel` (Llama 3, Qwen).
    """
    model, split = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    if model.get("type") != "BPE":
        return "its model is not BPE"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            return f"its model sets {name}"
    if spec.get("normalizer") is not None:
        return "it has a normalizer"
    for token in spec.get("added_tokens") or []:
        if any(token.get(name) for name in ("lstrip", "rstrip", "single_word")):
            return f"its added token {token['content']!r} is matched in a special way"
    byte_level = split
    if split.get("type") == "Sequence" and len(split["pretokenizers"]) == 2:
        by_pattern, byte_level = split["pretokenizers"]
        pattern = (by_pattern.get("pattern") or {}).get("Regex")
        if (
            not isinstance(pattern, str)
            or by_pattern.get("behavior") != "Isolated"
            or by_pattern.get("invert")
        ):
            return "its split is unknown"
        if classes := set(CHARACTER_CLASS.findall(pattern)) - {"L", "N"}:
            return f"its split asks for {', '.join(sorted(classes))}"
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space", True):
        return "its split is unknown"
    if byte_level.get("use_regex", True) != (byte_level is split):
        return "its split is unknown"
    return None


def sample_texts(added: Iterable[str]) -> list[str]:
    """The fixed sample: about 30 kB of prose, code and odd Unicode; the same on every machine."""
    rng = random.Random(20)
    spaces = [
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " \n ",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u200b",
        "\x85",
    ]
    spaces += ["\u2028", "\x1c", "\x1f", "\x0b", "\x0c", "\u180e", "\ufeff", "\u2060"]
    marks = list(".,;:!?'\"()[]{}<>/\\|-_=+*&^%$#@~`") + list("。，；：！？“”‘’（）《》、…—·¿«»")
    words = (
        "the The THE don't I'm we'll you've he'd they're it's IT'S 'S 'll x'tis naïve Straße İstanbul "
        "ﬁne e\u0301 第二天 早上他们 又来到海边 한국어 문장 にほんご カタカナ العربية हिन्दी ไทย עברית "
        "Ελληνικά Привет đồng 1 12 123 1234 12345 3.14 1,234.5 ٣٤ Ⅷ ½ ² x² 0x1F 10e-9 "
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 ❤️ \U0001f1e9\U0001f1ea a_b __init__ camelCase "
        "HTTPServer http://a.b/c?d=e&f=%20 user@host.org ==> /* */ #! <0x0A> <|x|>"
    )
    plain = words.split(" ")
    symbols = list(added)[:200]

    def soup() -> str:
        parts = []
        for _ in range(120):
            parts.append(rng.choice(plain if rng.random() < 0.7 else marks))
            if rng.random() < 0.7:
                parts.append(" " if rng.random() < 0.6 else rng.choice(spaces))
        return "".join(parts)

    def points(low: int, high: int, count: int) -> str:
        chosen = (rng.randrange(low, high) for _ in range(count))
        return "".join(chr(point) for point in chosen if not 0xD800 <= point < 0xE000)

    return [
        "",
        " ",
        "\n",
        "a",
        "It was a bright cold day in April, and the clocks weren't striking; “Well,” said Dr. Smith, “we'll"
        "\n\n\tsee!” He'd 3 apples (or 1,234.5)...   They're gone.  \n \n",
        "第二天早上，他们又来到海边。“你看，”他说，“今天没有风！”大家都笑了；谁也不知道为什么。\n"
        "\u3000\u3000然后……GPT-2模型有124M参数。",
        "def f(x: int) -> str:\n    if x >= 10:\n\t\treturn f'{x!r}'  # ok\n"
        '    return "\\n".join(str(i) for i in range(x))\n',
        *(soup() for _ in range(12)),
        *(points(0, 0x3000, 200) for _ in range(4)),
        *(points(0x3000, 0x11000, 200) for _ in range(3)),
        *(points(0x10000, 0x110000, 100) for _ in range(2)),
        "".join(chr(point) + "a" for point in range(0x300)),
        "x" * 300 + "ab" * 200 + "!" * 100 + " " * 100 + "\n" * 50 + "7" * 100 + "字" * 100,
        "".join(f"a{symbol}b {symbol} {symbol}{symbol}.\n" for symbol in symbols),
        " ".join(symbols),
    ]
