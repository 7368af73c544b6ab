"""Synthetic corpus lines: good ones in every JSON form, and bad ones with their reject reason."""

from __future__ import annotations

import gzip
import json
import random

PROSE = (
    "The old man, never tired, went on. ",
    "他说：“你好！我来了。”她笑了。",
    "</s> <unk> stay text. ",
    "Ünïcödé – “quotes” … ",
    "line\nbreaks\tand \u2028 separators \x85 ",
    "🎉 \U00020000 ",
    'quotes " and \\ and / ',
)


def prose(chance: random.Random) -> str:
    return "".join(chance.choices(PROSE, k=chance.randint(1, 12))) + "end"


def good_line(chance: random.Random, number: int) -> tuple[bytes, tuple]:
    """(line, expected document): a good record in one of many JSON forms."""
    identity, text = f"id-{number}", prose(chance)
    record: dict = {"id": identity, "content": text}
    shape = chance.randrange(12)
    if shape == 1:
        record = {"text": text, "id": identity}
    elif shape == 2:
        record |= {"score": float("nan"), "more": [{"a": [1, None, True]}] * 3}
    elif shape == 3:
        record["deep"] = json.loads("[" * 150 + "]" * 150)
    elif shape == 4:
        record = {"q_main": text, "id": identity, "std_ans": "A", "option_a": "甲" * 99}
        text += "\nA. " + "甲" * 99 + "\n答案：A"
    line = json.dumps(record, ensure_ascii=chance.random() < 0.5).encode("utf-8")
    if shape == 5:
        line = b"\xef\xbb\xbf" + line
    elif shape == 6:
        line = b" \t" + line + b" \r"
    elif shape == 7:  # the last of two equal keys counts
        line = b'{"content": 3, ' + line[1:]
    elif shape == 8:
        line = b"{\r" + line[1:]
    elif shape == 9:
        text = "\0" + text
        line = json.dumps(record | {"content": text}).encode()
    return line, (identity, text)


def bad_line(chance: random.Random) -> tuple[bytes, str | None]:
    """(line, reject reason); None for a blank line."""
    text = prose(chance)
    good = json.dumps({"id": "never", "content": text}, ensure_ascii=False)
    ascii_only = json.dumps({"id": "never", "content": text}).encode()
    # A place in the text between two characters, outside escapes.
    inside = chance.randint(len('{"id": "never", "content": "'), len(good) - 2)
    while good[inside - 1] == "\\":
        inside -= 1

    def put(stored: bytes) -> bytes:
        return good[:inside].encode() + stored + good[inside:].encode()

    def record(value: object) -> bytes:
        return json.dumps({"id": "never", "content": value, "title": text}).encode()

    undecodable = [b"\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xba"]
    choices = [
        lambda: (good[: chance.randint(1, len(good) - 1)].encode(), "invalid JSON"),  # cut
        lambda: (put(chance.choice(undecodable)), "undecodable bytes"),
        lambda: (json.dumps({"content": "中"}, ensure_ascii=False).encode()[:14], "undecodable bytes"),
        lambda: (ascii_only.decode().encode("utf-16"), "undecodable bytes"),
        lambda: (b"\xfe" + chance.randbytes(chance.randint(1, 300)).replace(b"\n", b""), "undecodable bytes"),
        lambda: (gzip.compress(ascii_only, mtime=0).replace(b"\n", b"") + b"\xff", "undecodable bytes"),
        lambda: (
            record(chance.choice([None, 3, 1.5, True, [text], {"text": text}, float("nan")])),
            "content is not text",
        ),
        lambda: (record(chance.choice(["", " ", "\t\n", "\u3000\u2028 \x85"])), "empty content"),
        lambda: (record(text + chance.choice(["\ud800", "\udfff x", "\udc00\ud800"])), "lone surrogate"),
        lambda: (json.dumps({"id": "never", "title": text}).encode(), "no content"),
        lambda: (json.dumps(chance.choice([[text], text, 3, None, False, []])).encode(), "not an object"),
        lambda: (
            ascii_only[:-1] + chance.choice([b"", b",}", b"]", b"}}", b"} x", b"}{}", b"}\0"]),
            "invalid JSON",
        ),
        lambda: (
            chance.choice([b"x", b"\0", b"//", b",", b"\x0b", b"\xc2\xa0"]) + ascii_only,
            "invalid JSON",
        ),
        lambda: (
            put(chance.choice([b"\0", b"\r", b"\t", b"\x1b", b"\\x", b"\\u12-", b"\\ud8 "])),
            "invalid JSON",
        ),
        lambda: (ascii_only.replace(b'"', b"'", 2), "invalid JSON"),
        lambda: (b"\xef\xbb\xbf\xef\xbb\xbf" + ascii_only, "invalid JSON"),
        lambda: (b"[" * chance.choice([1, 50, 5000, 90_000]), "invalid JSON"),
        lambda: (b'{"a":' * chance.choice([1, 50, 5000, 18_000]), "invalid JSON"),
        lambda: (deep(chance.choice([250, 2000, 40_000])), "invalid JSON"),
        lambda: (json.dumps({"content": "z" * 100_001}).encode(), "line too long"),
        lambda: (b"\xff[\0" * 33_400, "line too long"),
        lambda: (chance.choice([b"", b" ", b"\r", b"\t\r", b"\xef\xbb\xbf"]), None),
    ]
    return chance.choice(choices)()


def deep(depth: int) -> bytes:
    return b'{"content": "x", "a": ' + b"[" * depth + b"]" * depth + b"}"
