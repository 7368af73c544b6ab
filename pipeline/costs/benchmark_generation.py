"""`sllm benchmark generation`: new tokens per second, compared with a token-level model: OPT of a published
size or a recipe with the objective `lm`, run by Hugging Face's `generate` or another engine (`engines`).

Weights and prompts are random, because only lengths affect speed. Every sentence has exactly
`sentence_tokens` tokens (the end symbol is computed, but forced at that length), and the other model
generates as many tokens. Both are greedy, in one process, and alternate (A B A B …), so that noise of the
machine affects both.

tokens per second  from the end of the first new sentence to the end of the last; ours also computes end
                   symbols and backbone passes, which do not count as tokens
first sentence     seconds from the prompt's tokens to the first `sentence_tokens` new ones, all rows
cached bytes       of the places used in the caches after the run (Hugging Face: of its storages), per token
memory             (CPU) of the process, one process per model: resident `before` a run (weights and
                   libraries), at its `peak`, and `held` by the caches at its end; the cost of one more token
                   is the slope between the shortest and the longest context of the smallest batch
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from data_prep.common import charts
from data_prep.common.environment import write_result
from data_prep.common.errors import UserError, counted, log
from data_prep.common.measuring import in_new_process, memory_field, spread
from data_prep.common.page import NOTHING, Table, to_text
from pipeline.config.library import find_recipe
from pipeline.costs.benchmark import OPT_VOCABULARY, conditions, reading_rate, reset_peak, resident, start
from pipeline.costs.engines import ENGINES, SENTENCE_ROOM, Case, TokenSide, Turn
from pipeline.costs.generation_bound import bytes_per_token
from pipeline.costs.options import SIDES, GenerationBenchmark
from pipeline.costs.sized_recipe import DTYPES, Vocabulary, sized_recipe
from pipeline.generation.results import Limits, Piece, Request
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.models.factory import new_model
from pipeline.models.folders import parameter_count
from pipeline.models.inference import lay_out, to_int8


class LetterTokens:
    """A tokenizer in which every token is one letter, because texts do not matter here."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocab_size = vocabulary.vocab_size
        special = [vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id]
        self.byte_lengths = np.ones(self.vocab_size, dtype=np.int32)
        self.byte_lengths[special] = 0

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return b"x" * len(tokens)


class SentenceSide:
    """The SLLM, by `BatchWriter`."""

    def __init__(self, options: GenerationBenchmark, device: torch.device):
        recipe = options.recipe
        sized = sized_recipe(recipe, options.vae_recipe)
        if sized.objective != "sllm":
            raise UserError(
                f"recipe {recipe}: its objective is {sized.objective}; only an SLLM writes sentences"
            )
        self.name, self._sized = find_recipe(recipe).stem, sized
        vocabulary = Vocabulary(options.vocab_size or sized.reading_part.get("vocab_size", OPT_VOCABULARY))
        torch.manual_seed(sized.seed)
        text = {"segmenter": "clause", "language": "en", "max_tokens": SENTENCE_ROOM}
        self.model: Any = new_model(sized, vocabulary, text).to(device, DTYPES[options.dtype]).eval()
        self.parameters = parameter_count(self.model)
        (to_int8 if options.int8 else lay_out)(self.model)
        self._tokenizer: Any = LetterTokens(vocabulary)
        self._weight_bytes = 1 if options.int8 else torch.finfo(DTYPES[options.dtype]).bits // 8

    def bytes_per_token(self, case: Case) -> float:
        """What one token of one row reads by arithmetic (`sllm benchmark bound`)."""
        context = case.context + case.new_tokens // 2
        return bytes_per_token(
            self._sized, self._tokenizer.vocab_size, context, case.sentence_tokens, self._weight_bytes
        )

    def limit(self, case: Case) -> str | None:
        """Why a case cannot be measured; None if it can."""
        sentences = -(-case.context // case.sentence_tokens) + case.sentences
        room = self.model.max_sentences + 1
        return f"{counted(sentences, 'sentence')}, {counted(room, 'position')}" if sentences > room else None

    def turn(self, case: Case, prompts_BC: np.ndarray, at_end: Callable[[], None] = lambda: None) -> Turn:
        """One run; `at_end` is called while its caches still live."""
        limits = Limits(case.sentences, sentence_tokens=case.sentence_tokens)
        writer = BatchWriter(self.model, self._tokenizer, Sampling(), limits, case.batch)
        cuts = np.arange(case.sentence_tokens, case.context, case.sentence_tokens)
        requests = [
            Request(n, [part.tolist() for part in np.split(row, cuts)]) for n, row in enumerate(prompts_BC)
        ]
        written = np.zeros(case.batch, dtype=np.int64)
        first = last = 0.0
        started = time.perf_counter()
        for number, event in writer.run(requests):
            if isinstance(event, Piece):
                written[number] += 1
                last = time.perf_counter()
                if written[number] == case.sentence_tokens and written.min() == case.sentence_tokens:
                    first = last
        if written.tolist() != [case.new_tokens] * case.batch:
            raise RuntimeError(f"{case}: tokens written: {written.tolist()}")
        at_end()
        tokens = case.batch * (case.new_tokens - case.sentence_tokens)
        # A start position and all sentences but the last one, which is not fed back.
        places = 1 + len(cuts) + 1 + case.sentences - 1
        return Turn(
            first - started,
            tokens / (last - first),
            writer.cached_bytes_per_sentence * places * case.batch,
            (case.context + case.new_tokens - case.sentence_tokens) * case.batch,
            writer.decoder_bytes,
        )


def run(options: GenerationBenchmark) -> dict[str, Any]:
    """Measure what the options ask for; the result is plain JSON.

    Raises: UserError on bad options.
    """
    device = start(options)
    if options.output:
        charts.require()
    if options.sentences < 2:
        raise UserError("--sentences: at least 2, the first one is timed apart")
    held: dict[str, Any] = {}
    sides = {name: make_side(name, options, device) for name in SIDES[: 1 + bool(options.against)]}
    points = [measure(case, sides, options.runs) for case in _cases(options)]
    rate = reading_rate(device)
    for point, case in zip(points, _cases(options), strict=True):
        add_reading(point, case, sides, rate)
    if device.type == "cpu" and not options.no_memory:
        for name in sides:
            log(f"memory of {name}, in a process of its own")
            add_memory(points, name, in_new_process(memory_of, name, options))
        found = {name: held_per_token(points, name) for name in sides}
        held = {"held_per_token": {name: value for name, value in found.items() if value is not None}}
    result = {
        **conditions(options),
        "int8": options.int8,
        "engine": options.engine,
        "reading_bytes_per_second": rate,
        "sentences": options.sentences,
        "sentence_tokens": options.sentence_tokens,
        "against_by_columns": options.columns,
        **{side: {"name": one.name, "parameters": one.parameters} for side, one in sides.items()},
        "points": points,
        **held,
    }
    write_result(result, options.output)
    return result


def _cases(options: GenerationBenchmark) -> list[Case]:
    sizes = itertools.product(options.batch, options.context)
    return [Case(*size, options.sentences, options.sentence_tokens) for size in sizes]


def make_side(name: str, options: GenerationBenchmark, device: torch.device) -> SentenceSide | TokenSide:
    """The recipe's model, or the one it is measured against. Raises: UserError for a wrong kind."""
    return (SentenceSide if name == "model" else ENGINES[options.engine])(options, device)


def memory_of(name: str, options: GenerationBenchmark) -> list[dict[str, int] | None]:
    """`memory` of one side. Memory that the other one leaves behind would count too: call it in a new
    process."""
    return memory(make_side(name, options, start(options)), _cases(options))


def memory(side: SentenceSide | TokenSide, cases: Iterable[Case]) -> list[dict[str, int] | None]:
    """Resident bytes of this process for each case (`before`, `peak`, `held`) and its `tokens`; None for a
    case beyond the side's positions."""
    vocabulary = side.model.get_input_embeddings().weight.shape[0]
    small = Case(1, 1, 2, next(iter(cases)).sentence_tokens)
    side.turn(small, np.full((1, 1), 5))  # warm-up: threads, buffers of libraries
    found: list[dict[str, int] | None] = []
    for case in cases:
        if side.limit(case):
            found.append(None)
            continue
        prompts_BC = np.random.default_rng(case.context).integers(4, vocabulary, (case.batch, case.context))
        before = resident()
        reset_peak()
        figures = {"before": before}

        def at_end(figures=figures) -> None:
            figures["peak"] = memory_field("VmHWM")
            figures["held"] = resident() - figures["before"]

        figures["tokens"] = side.turn(case, prompts_BC, at_end).cached_tokens
        found.append(figures)
    return found


def add_memory(points: list[dict[str, Any]], name: str, found: list[dict[str, int] | None]) -> None:
    """Add a side's memory to its points, and the ratio once both sides have theirs."""
    for point, figures in zip(points, found, strict=True):
        if figures is None:
            continue
        point[name]["memory"] = figures
        if "ratios" in point and name == "against":
            point["ratios"]["memory_peak"] = point["model"]["memory"]["peak"] / figures["peak"]


def held_per_token(points: list[dict[str, Any]], name: str) -> float | None:
    """Resident bytes per token of context of a side: the slope between the shortest and the longest context
    at its smallest batch, so that the constant part (about 1 MB) does not count. None without two such cases,
    or if noise is larger."""
    found = [
        (p["batch"], memory["tokens"], memory["held"])
        for p in points
        if (memory := p[name].get("memory")) is not None
    ]
    alike = sorted((tokens, held) for batch, tokens, held in found if batch == min(found)[0])
    if not alike or alike[0][0] == alike[-1][0]:
        return None
    (few, low), (many, high) = alike[0], alike[-1]
    return (high - low) / (many - few) if high > low else None


def measure(case: Case, sides: dict[str, SentenceSide | TokenSide], runs: int) -> dict[str, Any]:
    """One case: a warm-up turn of each side, then `runs` turns each."""
    vocabulary = min(side.model.get_input_embeddings().weight.shape[0] for side in sides.values())
    rng = np.random.default_rng(case.batch * 1_000_003 + case.context)
    prompts_BC = rng.integers(4, vocabulary, (case.batch, case.context))
    why = {name: side.limit(case) for name, side in sides.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in sides if why[name] is None}
    for number in range(-1, runs):
        for name in turns:
            turn = sides[name].turn(case, prompts_BC)
            if number >= 0:
                turns[name].append(turn)
                log(
                    f"batch {case.batch}, context {case.context}, {sides[name].name}: "
                    f"{turn.tokens_per_second:.2f} tokens/s"
                )
    point: dict[str, Any] = {"batch": case.batch, "context": case.context}
    for name in sides:
        point[name] = {"refused": why[name]} if why[name] else _figures(turns[name])
    if all(name in turns for name in SIDES):
        ours, other = point["model"], point["against"]
        point["ratios"] = {
            key: ours[key]["median"] / other[key]["median"] for key in ("tokens_per_second", "first_sentence")
        }
        point["ratios"]["cached_bytes_per_token"] = (
            ours["cached_bytes_per_token"] / other["cached_bytes_per_token"]
        )
    return point


def add_reading(
    point: dict[str, Any], case: Case, sides: dict[str, SentenceSide | TokenSide], rate: float
) -> None:
    """Add to each side of a point of batch 1 the bytes that a token reads, and the share of the machine's
    reading rate that it reaches; and to the ratios what those bytes allow."""
    if case.batch != 1:  # rows share the weights that are read
        return
    measured = [name for name in sides if "refused" not in point[name]]
    for name in measured:
        figures = point[name]
        figures["bytes_per_token"] = sides[name].bytes_per_token(case)
        read = figures["tokens_per_second"]["median"] * figures["bytes_per_token"]
        figures["reading_share"] = read / rate
    if "ratios" in point:
        ours, other = (point[name]["bytes_per_token"] for name in SIDES)
        point["ratios"]["bytes_bound"] = other / ours


def _figures(turns: list[Turn]) -> dict[str, Any]:
    last = turns[-1]
    return {
        "tokens_per_second": spread([turn.tokens_per_second for turn in turns]),
        "first_sentence": spread([turn.first_sentence for turn in turns]),
        "cached_bytes_per_token": last.cache_bytes / last.cached_tokens,
        "cache_bytes": last.cache_bytes,
        "step_bytes": last.step_bytes,
    }


def format_benchmark(result: dict[str, Any]) -> str:
    """The result of `run` as text."""
    where = result["gpu"] or f"{result['cpu']}, {counted(result['threads'], 'thread')}"
    sides = [side for side in SIDES if side in result]
    names = [result[side]["name"] for side in sides]
    header = ["batch", "context"]
    for name in names:
        header += [f"{name} tokens/s", "of reading rate", "1st sentence s", "peak GB", "held MB"]
    rows = []
    for point in result["points"]:
        row = [str(point["batch"]), f"{point['context']:,}"]
        for figures in map(point.get, sides):
            if "refused" in figures:
                row += [f"({figures['refused']})", *[NOTHING] * 4]
                continue
            row.append(f"{figures['tokens_per_second']['median']:,.2f}")
            row.append(format(figures["reading_share"], ".0%") if "reading_share" in figures else NOTHING)
            row.append(f"{figures['first_sentence']['median']:.3f}")
            held = figures.get("memory")
            row += [f"{held['peak'] / 1e9:.3f}", f"{held['held'] / 1e6:,.1f}"] if held else [NOTHING] * 2
        if len(names) == 2:
            ratios = point.get("ratios", {})
            shown = (
                ("tokens_per_second", ".2f"),
                ("bytes_bound", ".2f"),
                ("cached_bytes_per_token", ".1%"),
                ("memory_peak", ".2f"),
            )
            row += [format(ratios[key], form) if key in ratios else NOTHING for key, form in shown]
        rows.append(row)
    header += ["× tokens/s", "× by bytes", "cached bytes a token", "× peak"] if len(names) == 2 else []
    lines = [
        f"{' beside '.join(names)}: {result['dtype']}, "
        f"{counted(result['sentence_tokens'], 'token')} a sentence, "
        f"{where}; medians of {counted(result['runs'], 'run')}",
        "",
        to_text(Table(header, rows)),
    ]
    if per_token := result.get("held_per_token"):
        lines.append(
            "one more token of context holds "
            + ", ".join(f"{value:,.0f} bytes ({result[side]['name']})" for side, value in per_token.items())
            + (f": {per_token['model'] / per_token['against']:.1%}" if len(per_token) == 2 else "")
        )
    return "\n".join(lines)
