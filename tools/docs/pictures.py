"""`python -m tools.docs.pictures`: the diagrams of README and docs, as SVG in docs/assets.

With `--check` nothing is written; the exit status is 1 where a file differs. Lengths are in points, and y
points down.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.common.charts import PALETTE, STYLE, figure_svg
from data_prep.common.errors import run_main
from data_prep.common.files import write_atomically

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"
SAMPLE = ("The night was cold,", "so he lit the lamp", "and sat down to read.")


class Canvas:
    """Boxes, arrows and words on a plane of `width` × `height` points."""

    def __init__(self, width: int, height: int):
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(fname=STYLE):
            self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)
            self.axes = self.figure.add_axes((0, 0, 1, 1))
            self.axes.set(xlim=(-2, width + 2), ylim=(height, 0))
            self.axes.axis("off")

    def box(
        self, x: float, y: float, w: float, h: float, text: str = "", colour: str = "sllm", **style: Any
    ) -> None:
        """A filled box with words; `outline=True` draws the edge alone."""
        from matplotlib.patches import FancyBboxPatch

        hue, outline = PALETTE[colour][0], style.pop("outline", False)
        shape = "round,pad=0,rounding_size=4"
        face = "none" if outline else hue
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, shape, edgecolor=hue, linewidth=1.2, facecolor=face))
        if text:
            self.text(x + w / 2, y + h / 2, text, "ink" if outline else "on", ha="center", **style)

    def text(self, x: float, y: float, text: str, colour: str = "soft", **style: Any) -> None:
        usual: dict[str, Any] = {"ha": "left", "va": "center", "fontsize": 12, "linespacing": 1.25}
        self.axes.text(x, y, text, color=PALETTE[colour][0], **usual | style)

    def arrow(
        self, x: float, y: float, to_x: float, to_y: float, colour: str = "soft", bend: float = 0
    ) -> None:
        style = {"arrowstyle": "-|>", "color": PALETTE[colour][0], "shrinkA": 0, "shrinkB": 0, "lw": 1.2}
        self.axes.annotate(
            "", (to_x, to_y), (x, y), arrowprops=style | {"connectionstyle": f"arc3,rad={bend}"}
        )


def overview() -> Canvas:
    """The same text in a token model and in an SLLM."""
    canvas = Canvas(720, 330)
    words = [word for clause in SAMPLE for word in clause.split()]
    canvas.text(0, 12, "Token model: one step of the whole model per token", "lm")
    widths = [9 + 6.6 * len(word) for word in words]
    x, gap = 0.0, 4
    scale = (720 - gap * (len(words) - 1)) / sum(widths)
    for word, width in zip(words, widths, strict=True):
        canvas.box(x, 28, width * scale, 22, word, "lm", outline=True, fontsize=11)
        canvas.arrow(x + width * scale / 2, 52, x + width * scale / 2, 64, "lm")
        x += width * scale + gap
    canvas.box(0, 66, 720, 28, "decoder-only transformer over tokens", "lm")

    canvas.text(0, 126, "SLLM: one step of the large part per sentence", "sllm")
    third = 240.0
    for n, clause in enumerate(SAMPLE):
        left = n * third
        canvas.box(left, 142, third - 14, 22, clause, "sllm", outline=True, fontsize=11)
        middle = left + (third - 14) / 2
        canvas.arrow(middle, 166, middle, 178, "vae")
        canvas.box(middle - 66, 180, 132, 24, "encoder", "vae")
        canvas.arrow(middle, 206, middle, 218, "sllm")
        canvas.text(middle + 8, 212, "one vector", "soft", fontsize=10)
        canvas.arrow(middle, 252, middle, 264, "sllm")
        canvas.box(middle - 66, 266, 132, 24, "decoder", "vae")
        canvas.arrow(middle, 292, middle, 304, "vae")
        after = SAMPLE[n + 1] if n + 1 < len(SAMPLE) else "…"
        canvas.text(middle, 316, after, "ink", ha="center", fontsize=11)
    canvas.box(0, 220, 706, 30, "backbone: decoder-only transformer over sentence vectors", "sllm")
    return canvas


def chain(canvas: Canvas, y: float, steps: Sequence[tuple[str, str, str]], width: float, step: float) -> None:
    """Boxes in a row with arrows between them; each has a name, a colour and words below."""
    for n, (name, colour, below) in enumerate(steps):
        left = n * step
        canvas.box(left, y, width, 34, name, colour, fontsize=11)
        canvas.text(left + width / 2, y + 56, below, "soft", ha="center", fontsize=10)
        if n + 1 < len(steps):
            canvas.arrow(left + width + 2, y + 17, left + step - 2, y + 17)


def data_flow() -> Canvas:
    canvas = Canvas(720, 190)
    first = [
        ("text", "ngram", "files, archives,\nbuckets"),
        ("documents", "other-4", "cleaned, counted,\ndeduplicated"),
        ("shards", "other-4", "tokens and cut points\n`data-prep shard`"),
        ("bins", "sllm", "one order for\nany number of ranks"),
        ("batches", "sllm", "packed, without\npadding"),
    ]
    second = [
        ("engine step", "sllm", "DeepSpeed\n`sllm train`"),
        ("checkpoint", "sllm", "complete or absent"),
        ("model folder", "vae", "safetensors, card\n`sllm export`"),
        ("scores", "vae", "`sllm evaluate`\n`sllm check`"),
        ("text", "vae", "`sllm generate`\n`sllm serve`"),
    ]
    for y, steps in ((6, first), (106, second)):
        chain(canvas, y, [(name, hue, below.replace("`", "")) for name, hue, below in steps], 118, 150)
    return canvas


def shard_format() -> Canvas:
    canvas = Canvas(720, 172)
    canvas.text(0, 12, "shard-000000.tar", "ink")
    canvas.text(0, 116, "one document", "ink")
    members = ("group 0: tokens", "group 0: lengths", "group 0: ids", "group 1: tokens", "…")
    for n, name in enumerate(members):
        canvas.box(n * 145, 26, 138, 34, name, "other-4" if n < 3 else "other-1" if n < 4 else "ngram")
    canvas.arrow(130, 62, 130, 126)
    canvas.text(
        150, 92, "an index names each document's place: any one is read by a seek", "soft", fontsize=11
    )
    for n, (size, name) in enumerate(
        ((150, "sentence 1"), (96, "sentence 2"), (210, "sentence 3"), (120, "…"))
    ):
        left = (0, 153, 252, 465)[n]
        canvas.box(left, 130, size, 30, name, "sllm")
    return canvas


def packing() -> Canvas:
    canvas = Canvas(720, 176)
    padded = ((150, 210, 96), (230, 80, 120), (60, 170, 240))
    canvas.text(0, 12, "Padded batch: rows as long as the longest sentence", "soft")
    for row, lengths in enumerate(padded):
        for n, size in enumerate(lengths):
            canvas.box(n * 243, 26 + row * 20, 234, 15, "", "rest")
            canvas.box(n * 243, 26 + row * 20, size * 234 / 240, 15, "", "sllm")
    canvas.text(0, 110, "Packed bin: real tokens only, borders in cu_sentences and cu_documents", "soft")
    x, sizes = 0.0, [size for row in padded for size in row]
    scale = 720 / sum(sizes)
    for n, size in enumerate(sizes):
        canvas.box(x + 1, 124, size * scale - 2, 24, "", ("sllm", "vae", "lm")[n // 3])
        x += size * scale
    for n in range(3):
        middle = sum(sizes[: 3 * n]) * scale + sum(sizes[3 * n : 3 * n + 3]) * scale / 2
        canvas.text(middle, 164, f"document {n + 1}", "soft", ha="center", fontsize=11)
    return canvas


def causal_masks() -> Canvas:
    canvas = Canvas(720, 250)
    lengths, cell = (3, 4, 2), 18
    sentence = [n for n, length in enumerate(lengths) for _ in range(length)]

    def grid(left: float, title: str, size: int, seen: Callable[[int, int], bool], colour: str) -> None:
        canvas.text(left, 14, title, "ink")
        for row in range(size):
            for column in range(size):
                hue = colour if seen(row, column) else "rest"
                canvas.box(left + column * cell, 34 + row * cell, cell - 2, cell - 2, "", hue)

    total = len(sentence)
    grid(0, "encoder", total, lambda q, k: sentence[q] == sentence[k], "vae")
    grid(250, "backbone", len(lengths), lambda q, k: k <= q, "sllm")
    grid(500, "decoder", total, lambda q, k: sentence[q] == sentence[k] and k <= q, "vae")
    canvas.text(0, 214, "rows: tokens; a token sees\nits own sentence", "soft", fontsize=11)
    canvas.text(
        250, 214, "rows: sentence vectors; one sees\nthose before it in its document", "soft", fontsize=11
    )
    canvas.text(500, 214, "a token sees earlier ones of its\nsentence, and one vector", "soft", fontsize=11)
    return canvas


def checkpoint() -> Canvas:
    canvas = Canvas(720, 110)
    steps = [
        ("copied", "sllm", "to host memory;\ntraining continues"),
        ("written", "other-4", "by a thread, under\nanother name"),
        ("verified", "other-4", "every file hashed\nand flushed"),
        ("renamed", "vae", "now it exists"),
        ("current", "vae", "`latest` names it;\nold ones go"),
    ]
    chain(canvas, 6, [(name, hue, below.replace("`", "")) for name, hue, below in steps], 118, 150)
    return canvas


PICTURES: dict[str, tuple[Callable[[], Canvas], str]] = {
    "overview": (
        overview,
        "A token model runs all of its layers for each token. An SLLM encodes each sentence into one vector, "
        "predicts the next vector, and decodes it.",
    ),
    "data-flow": (
        data_flow,
        "Text becomes documents, shards, bins and batches; a run makes checkpoints and models.",
    ),
    "shard-format": (
        shard_format,
        "A shard is a tar file of groups of documents; a document is tokens with cut points.",
    ),
    "packing": (packing, "A padded batch computes grey cells; a packed bin holds real tokens only."),
    "causal-masks": (causal_masks, "Which positions attend to which in encoder, backbone and decoder."),
    "checkpoint": (
        checkpoint,
        "The life of a checkpoint: copied, written aside, verified, renamed, made current.",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.docs.pictures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 for a difference")
    check = parser.parse_args().check
    stale = []
    for name, (draw, label) in PICTURES.items():
        path, text = ASSETS / f"{name}.svg", figure_svg(draw().figure, label) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(f"{path.name}: differs from its code")
            if not check:
                write_atomically(path, text.encode())
    print("\n".join(stale) or "docs: every diagram is what its code draws")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(run_main("docs_pictures", main))
