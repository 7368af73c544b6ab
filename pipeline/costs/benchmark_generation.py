"""`sllm benchmark generation`: new tokens per second, compared with a token-level model: OPT of a published
size or a recipe with the objective `lm`, run by Hugging Face's `generate` with its own cache.

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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from data_prep.common import charts
from data_prep.common.environment import write_result
from data_prep.common.errors import UserError, counted, log
from data_prep.common.measuring import in_new_process, memory_field, spread
from data_prep.common.page import NOTHING, Table, to_text
from pipeline.config.library import find_recipe
from pipeline.costs.benchmark import (
    OPT_SIZES,
    OPT_VOCABULARY,
    conditions,
    published_opt,
    reset_peak,
    resident,
    start,
)
from pipeline.costs.options import SIDES, GenerationBenchmark
from pipeline.costs.sized_recipe import DTYPES, Vocabulary, sized_recipe
from pipeline.generation.results import Limits, Piece, Request
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.models.factory import new_model
from pipeline.models.folders import parameter_count
from pipeline.models.inference import lay_out, to_int8
from pipeline.models.token_lm import TokenLM

SENTENCE_ROOM = 64  # longest sentence of the models measured


class LetterTokens:
    """A tokenizer in which every token is one letter, because texts do not matter here."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocab_size = vocabulary.vocab_size
        special = [vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id]
        self.byte_lengths = np.ones(self.vocab_size, dtype=np.int32)
        self.byte_lengths[special] = 0

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return b"x" * len(tokens)


@dataclass(frozen=True)
class Case:
    """One point of the measurement: texts at once; context tokens and new sentences of each."""

    batch: int
    context: int
    sentences: int
    sentence_tokens: int

    @property
    def new_tokens(self) -> int:
        return self.sentences * self.sentence_tokens


@dataclass(frozen=True)
class Turn:
    """Figures of one run of one side."""

    first_sentence: float  # seconds
    tokens_per_second: float  # new tokens of all rows after their first sentence
    cache_bytes: int  # of the context and the new tokens, all rows
    cached_tokens: int  # tokens in those bytes
    step_bytes: int = 0  # of caches that do not depend on the context's length (a decoder's), all rows


class SentenceSide:
    """The SLLM, by `BatchWriter`."""

    def __init__(self, options: GenerationBenchmark, device: torch.device):
        recipe = options.recipe
        sized = sized_recipe(recipe, options.vae_recipe)
        if sized.objective != "sllm":
            raise UserError(
                f"recipe {recipe}: its objective is {sized.objective}; only an SLLM writes sentences"
            )
        self.name = find_recipe(recipe).stem
        vocabulary = Vocabulary(options.vocab_size or sized.reading_part.get("vocab_size", OPT_VOCABULARY))
        torch.manual_seed(sized.seed)
        text = {"segmenter": "clause", "language": "en", "max_tokens": SENTENCE_ROOM}
        self.model: Any = new_model(sized, vocabulary, text).to(device, DTYPES[options.dtype]).eval()
        self.parameters = parameter_count(self.model)
        (to_int8 if options.int8 else lay_out)(self.model)
        self._tokenizer: Any = LetterTokens(vocabulary)

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


class _Clock(StoppingCriteria):
    """Never stops; records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TokenSide:
    """A token-level model, by Hugging Face's `generate`."""

    def __init__(self, options: GenerationBenchmark, device: torch.device):
        torch.manual_seed(0)
        model, self.name = _token_model(options.against, options.vocab_size)
        self.model = model.to(device, DTYPES[options.dtype]).eval()
        if options.columns:
            lay_out(self.model)
        self.parameters = parameter_count(self.model)
        self.model.generation_config.pad_token_id = 1

    def limit(self, case: Case) -> str | None:
        room = self.model.config.max_position_embeddings
        needed = case.context + case.new_tokens
        return f"{counted(needed, 'token')}, {counted(room, 'position')}" if needed > room else None

    def turn(self, case: Case, prompts_BC: np.ndarray, at_end: Callable[[], None] = lambda: None) -> Turn:
        """One run; `at_end` is called while its caches still live."""
        clock = _Clock()
        ids = torch.from_numpy(prompts_BC).to(self.model.device)
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                min_new_tokens=case.new_tokens,
                max_new_tokens=case.new_tokens,
                return_dict_in_generate=True,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        if out.sequences.shape[1] != case.context + case.new_tokens:
            raise RuntimeError(f"{case}: tokens written: {out.sequences.shape[1] - case.context}")
        at_end()
        first, last = clock.times[case.sentence_tokens - 1], clock.times[-1]
        cache = out.past_key_values
        layers = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        return Turn(
            first - started,
            case.batch * (case.new_tokens - case.sentence_tokens) / (last - first),
            sum(x.untyped_storage().nbytes() for x in layers),
            cache.get_seq_length() * case.batch,
        )


def _token_model(against: str, vocab_size: int | None) -> tuple[Any, str]:
    """A token-level model with random weights, and its name. Raises: UserError for anything else."""
    if against in OPT_SIZES:
        return published_opt(against, vocab_size or OPT_VOCABULARY), against
    if not find_recipe(against).is_file():
        raise UserError(f"--against {against}: neither {', '.join(OPT_SIZES)} nor a recipe")
    recipe = sized_recipe(against)
    if recipe.objective != "lm" or recipe.model.layout == "anchors":
        what = "layout is anchors" if recipe.objective == "lm" else f"objective is {recipe.objective}"
        raise UserError(f"--against {against}: its {what}; give a token-level model")
    vocabulary = Vocabulary(vocab_size or recipe.model.backbone.get("vocab_size", OPT_VOCABULARY))
    model = new_model(recipe, vocabulary, {"max_tokens": SENTENCE_ROOM})
    assert isinstance(model, TokenLM)
    return model.model, find_recipe(against).stem


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
    if device.type == "cpu" and not options.no_memory:
        for name in sides:
            log(f"memory of {name}, in a process of its own")
            add_memory(points, name, in_new_process(memory_of, name, options))
        found = {name: held_per_token(points, name) for name in sides}
        held = {"held_per_token": {name: value for name, value in found.items() if value is not None}}
    result = {
        **conditions(options),
        "int8": options.int8,
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
    return (SentenceSide if name == "model" else TokenSide)(options, device)


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
        header += [f"{name} tokens/s", "1st sentence s", "peak GB", "held MB"]
    rows = []
    for point in result["points"]:
        row = [str(point["batch"]), f"{point['context']:,}"]
        for figures in map(point.get, sides):
            if "refused" in figures:
                row += [f"({figures['refused']})", *[NOTHING] * 3]
                continue
            row.append(f"{figures['tokens_per_second']['median']:,.2f}")
            row.append(f"{figures['first_sentence']['median']:.3f}")
            held = figures.get("memory")
            row += [f"{held['peak'] / 1e9:.3f}", f"{held['held'] / 1e6:,.1f}"] if held else [NOTHING] * 2
        if len(names) == 2:
            ratios = point.get("ratios", {})
            shown = (("tokens_per_second", ".2f"), ("cached_bytes_per_token", ".1%"), ("memory_peak", ".2f"))
            row += [format(ratios[key], form) if key in ratios else NOTHING for key, form in shown]
        rows.append(row)
    header += ["× tokens/s", "cached bytes a token", "× peak"] if len(names) == 2 else []
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
