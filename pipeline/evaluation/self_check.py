"""`sllm check`: tests the guarantees of any model (SLLM, SentenceVAE, token-level) on random documents.

    causal             changing a document from some token on changes no earlier score and no other document
                       (SentenceVAE: changing a sentence changes only that sentence), on every attention path
    packed = single    a document scores the same alone and packed with others, on every attention path
    paths agree        every attention path gives the same scores; on a GPU also its kernels, against the
                       exact path of the same precision
    cached = uncached  generation symbol by symbol with caches gives the scores of the packed forward

A score is the NLL in nats of one symbol given those before it, or of one stop decision. Differences are
absolute, relative for scores above 1 nat. The report holds the largest difference of each check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.errors import UserError
from pipeline.data.batch import Batch, build_batch
from pipeline.data.windows import Span
from pipeline.models.anchor_lm import AnchorLM
from pipeline.models.attention import KERNELS, PATHS, attention_path
from pipeline.models.factory import load_model
from pipeline.models.folders import model_kind
from pipeline.models.stack import StackConfig
from pipeline.parallel.device import DeviceName, DtypeName, choose_device

LONGEST_SENTENCE = 24  # short random sentences, so that a check takes seconds on a large model too
MOST_SENTENCES = 7
MOST_BEYOND = 100
CHANGES_PER_DOCUMENT = 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # largest accepted difference

# [document][sentence] → float64: its symbols in order, its end, its stop decision.
Scores = list[list[np.ndarray]]


@dataclass
class Finding:
    """One check's result. compared: number of scores; changed: the largest change where change is allowed."""

    check: str
    path: str
    tolerance: float
    max_difference: float = 0.0
    compared: int = 0
    changed: float = field(default=0.0)

    def compare(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Record the difference of two score arrays of one shape; a NaN counts as infinite."""
        self.compared += expected.size
        self.max_difference = max(self.max_difference, _difference(expected, found))

    @property
    def passed(self) -> bool:
        return self.compared > 0 and self.max_difference <= self.tolerance


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    if not expected.size:
        return 0.0
    difference = np.abs(expected - found) / np.maximum(1.0, np.abs(expected))
    return float(np.nan_to_num(difference, nan=1e30, posinf=1e30).max())


class Checker:
    """Runs the checks on one model (in eval mode) with documents made from `seed`."""

    def __init__(
        self, model: torch.nn.Module, documents: int = 6, seed: int = 0, tolerance: float | None = None
    ):
        self.model: Any = model
        self._given = tolerance
        self.not_checked: dict[str, str] = {}  # attention kernel → why it cannot run the model here
        self.kind = model_kind(model)
        self.rng = np.random.default_rng(seed)
        self.longest, most_sentences, self.ids = _limits(model, self.kind)
        self.spans = [self._document(most_sentences) for _ in range(max(2, documents))]
        if long := _beyond_windows(model, self.longest):
            self.spans[0] = _span([self._sentence() for _ in range(long)], True)

    @property
    def tolerance(self) -> float:
        """As given, or by the model's precision."""
        return TOLERANCE[next(self.model.parameters()).dtype] if self._given is None else self._given

    def _sentence(self) -> np.ndarray:
        return self.rng.choice(self.ids, int(self.rng.integers(1, self.longest + 1)))

    def _document(self, most_sentences: int) -> Span:
        sentences = [self._sentence() for _ in range(int(self.rng.integers(2, most_sentences + 1)))]
        return _span(sentences, bool(self.rng.integers(2)))

    def scores(self, spans: list[Span]) -> Scores:
        """The packed forward's scores of all documents in one batch."""
        batch = build_batch(spans).to(self.model.device)
        losses = self.model(batch)
        nll_N = losses.target_nll_N.double().cpu().numpy()
        lengths = np.diff(batch.cu_sentences)
        if self.kind == "lm" or losses.stop_nll_S is None and self.kind == "sllm":
            return _by_sentence_lm(nll_N, self.model.as_read(batch) if self.kind == "lm" else batch)
        scores = np.split(nll_N, np.cumsum(lengths + 1)[:-1])
        if losses.stop_nll_S is not None:
            stop_nll_S = losses.stop_nll_S.double().cpu().numpy()
            scores = [np.append(score, stop) for score, stop in zip(scores, stop_nll_S, strict=True)]
        return [scores[first:end] for first, end in _ranges(batch.cu_documents)]

    def causal(self, path: str) -> Finding:
        """Replace a document from one token on and compare everything before that token."""
        finding = Finding("causal", path, self.tolerance)
        before = self.scores(self.spans)
        for at, span in enumerate(self.spans):
            sentences = _sentences(span)
            for j in sorted(self.rng.permutation(len(sentences))[:CHANGES_PER_DOCUMENT]):
                keep = 0 if self.kind == "vae" else int(self.rng.integers(0, len(sentences[j])))
                changed = list(sentences)
                other = np.concatenate([sentences[j][:keep], self._other(sentences[j][keep])])
                changed[j] = other[: self.longest]
                spans = [*self.spans[:at], _span(changed, span.document_end), *self.spans[at + 1 :]]
                self._compare_unchanged(finding, before, self.scores(spans), at, int(j), keep)
        return finding

    def _other(self, token: int) -> np.ndarray:
        """A new rest of a sentence whose first token is not `token`."""
        rest = self.rng.choice(self.ids, int(self.rng.integers(1, max(2, self.longest // 2))))
        while rest[0] == token:
            rest[0] = self.rng.choice(self.ids)
        return rest

    def _compare_unchanged(
        self, finding: Finding, before: Scores, after: Scores, at: int, j: int, keep: int
    ) -> None:
        for document, (old, new) in enumerate(zip(before, after, strict=True)):
            for s, (old_s, new_s) in enumerate(zip(old, new, strict=True)):
                inside = document == at and s == j
                if document != at or s < j or (self.kind == "vae" and not inside):
                    finding.compare(old_s, new_s)
                elif inside:
                    # The symbol at `keep` is another one now; predictions before it must not depend on it.
                    finding.compare(old_s[:keep], new_s[:keep])
                    size = min(len(old_s), len(new_s))
                    finding.changed = max(finding.changed, _difference(old_s[keep:size], new_s[keep:size]))
                else:
                    finding.changed = max(finding.changed, _difference(old_s, new_s))

    def packed_is_single(self, path: str) -> Finding:
        """Each document alone against all of them in one batch."""
        finding = Finding("packed = single", path, self.tolerance)
        for span, packed in zip(self.spans, self.scores(self.spans), strict=True):
            (single,) = self.scores([span])
            finding.compare(np.concatenate(packed), np.concatenate(single))
        return finding

    def paths_agree(self, paths: Sequence[str]) -> Finding:
        """The first attention path against every other one."""
        finding = Finding("paths agree", " = ".join(paths), self.tolerance)
        results = []
        for path in paths:
            with attention_path(path):
                results.append(np.concatenate([s for document in self.scores(self.spans) for s in document]))
        for other in results[1:]:
            finding.compare(results[0], other)
        return finding

    def _usable_kernels(self) -> list[str]:
        usable = []
        for path in KERNELS:
            with attention_path(path):
                try:
                    self.scores(self.spans[:1])
                    usable.append(path)
                except UserError as error:
                    self.not_checked[path] = str(error).partition("here: ")[2] or str(error)
        return usable

    def cached_is_uncached(self) -> Finding:
        """Teacher-forced generation with caches against the packed forward."""
        finding = Finding("cached = uncached", "cached", self.tolerance)
        steps = {"sllm": self._cached_sllm, "vae": self._cached_vae, "lm": self._cached_lm}[self.kind]
        if isinstance(self.model, AnchorLM):
            steps = self._cached_sllm
        for span, uncached in zip(self.spans, self.scores(self.spans), strict=True):
            finding.compare(np.concatenate(uncached), np.asarray(list(steps(span))))
        return finding

    def _cached_sllm(self, span: Span) -> Iterator[float]:
        state = self.model.begin()
        sentences = _sentences(span)
        if getattr(self.model.config, "ends", None) == "rule":
            yield from self._cached_by_rule(state, sentences, span.document_end)
            return
        for number, sentence in enumerate(sentences, 1):
            yield from self._decoded(self.model, self.model.decode_begin(state), sentence)
            self.model.append(state, sentence.tolist())
            stops = number == len(sentences) and span.document_end
            stop = self.model.stop_probability(state)
            yield float(-np.log(np.maximum(stop if stops else 1 - stop, 1e-30)))

    def _cached_by_rule(self, state: Any, sentences: list[np.ndarray], document_end: bool) -> Iterator[float]:
        """A sentence's end counts from the first token behind it; the document's is a symbol."""
        words, end = self.model.decode_begin(state), self.model.config.eos_token_id
        for number, sentence in enumerate(sentences):
            for symbol in sentence.tolist():
                yield float(-words.logits.double().log_softmax(-1)[symbol])
                self.model.decode_step(words, symbol)
            if number + 1 < len(sentences):
                self.model.append(state, sentence.tolist())
        if document_end:
            yield float(-words.logits.double().log_softmax(-1)[end])

    def _cached_vae(self, span: Span) -> Iterator[float]:
        for sentence in _sentences(span):
            vector_1d = self.model.encode(build_batch([_span([sentence], True)]).to(self.model.device))
            yield from self._decoded(self.model, self.model.decode_begin(vector_1d), sentence)

    def _decoded(self, decoder: Any, state: Any, sentence: np.ndarray) -> Iterator[float]:
        """NLL of every token of a sentence and of its end, one cached decoder step each."""
        for symbol in [*sentence.tolist(), self.model.config.eos_token_id]:
            yield float(-state.logits.double().log_softmax(-1)[symbol])
            if symbol != self.model.config.eos_token_id:
                decoder.decode_step(state, symbol)

    def _cached_lm(self, span: Span) -> Iterator[float]:
        config = self.model.config
        tokens = self.model.as_read(build_batch([span])).tokens_T.tolist()
        symbols = [*tokens, *([config.eos_token_id] if span.document_end else [])]
        cache, last = None, config.bos_token_id
        for symbol in symbols:
            ids = torch.tensor([[last]], device=self.model.device)
            out = self.model.model(input_ids=ids, past_key_values=cache, use_cache=True)
            yield float(-out.logits[0, -1].double().log_softmax(-1)[symbol])
            cache, last = out.past_key_values, symbol

    @torch.inference_mode()
    def run(self) -> list[Finding]:
        """All checks, in the order of the module's docstring."""
        findings = self._on_paths(PATHS)
        findings.append(self.paths_agree(PATHS))
        if getattr(self.model.config, "places", None) == "random":
            self.not_checked["cached"] = "anchors at random places are a control, which does not generate"
            return findings
        return [*findings, self.cached_is_uncached()]

    @torch.inference_mode()
    def run_kernels(self) -> list[Finding]:
        """The checks of a forward on the attention kernels that can run this model here."""
        usable = self._usable_kernels()
        return [*self._on_paths(usable), self.paths_agree([PATHS[0], *usable])] if usable else []

    def _on_paths(self, paths: Sequence[str]) -> list[Finding]:
        findings = []
        for path in paths:
            with attention_path(path):
                findings += [self.causal(path), self.packed_is_single(path)]
        return findings


def _limits(model: Any, kind: str) -> tuple[int, int, np.ndarray]:
    """Longest sentence and most sentences of a random document, and the token ids to draw from."""
    config, most_sentences, longest = model.config, MOST_SENTENCES, LONGEST_SENTENCE
    if kind == "lm":
        positions = getattr(config, "max_position_embeddings", None) or 1 << 30
        longest = min(longest, getattr(config, "max_sentence_tokens", longest))
        longest = max(2, min(longest, (positions - 1) // most_sentences - model.sentence_ends))
        vocabulary = config.vocab_size
    else:
        longest, vocabulary = min(longest, config.max_sentence_tokens), config.vocab_size
    if kind == "sllm":
        most_sentences = min(most_sentences, model.max_sentences)
    special = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
    return longest, most_sentences, np.setdiff1d(np.arange(vocabulary), [i for i in special if i is not None])


def _beyond_windows(model: Any, longest: int) -> int:
    """Sentences of a document beyond a stack's attention windows and memory, or those of anchors, so that
    its caches roll over; 0 for another layout."""
    config = model.config
    if isinstance(model, AnchorLM):
        most = config.max_position_embeddings // longest - 1
        return min(MOST_BEYOND, most, 2 * (config.attention_window or 0) // longest + 2)
    if not isinstance(config, StackConfig):
        return 0
    rows = 3 * config.attention_window + 2 * config.max_sentence_tokens
    return min(MOST_BEYOND, model.max_sentences, max(2 * rows // longest, 2 * config.memory + 2))


def _span(sentences: list[np.ndarray], document_end: bool) -> Span:
    return Span(np.concatenate(sentences), np.asarray([len(s) for s in sentences]), document_end)


def _sentences(span: Span) -> list[np.ndarray]:
    return np.split(span.tokens, np.cumsum(span.sentence_lengths)[:-1])


def _ranges(cuts: np.ndarray) -> list[tuple[int, int]]:
    return [(int(first), int(end)) for first, end in zip(cuts[:-1], cuts[1:], strict=True)]


def _by_sentence_lm(nll_N: np.ndarray, batch: Batch) -> Scores:
    """A token model's targets (tokens of a window, then its document end, if any) by sentence."""
    scores, at = [], 0
    for (first, end), document_end in zip(_ranges(batch.cu_documents), batch.document_end_D, strict=True):
        lengths = np.diff(batch.cu_sentences[first : end + 1])
        lengths[-1] += document_end
        scores.append(np.split(nll_N[at : at + lengths.sum()], np.cumsum(lengths)[:-1]))
        at += int(lengths.sum())
    return scores


def check_model(
    model: torch.nn.Module,
    documents: int = 6,
    seed: int = 0,
    tolerance: float | None = None,
    half_kernels: bool = False,
) -> dict:
    """Run all checks on a loaded model.

    half_kernels: the kernels are checked in bf16, which is what they take on a GPU; the model stays in it.
    Returns: the report (`kind`, `passed`, `tolerance`, `checks`, `not_checked`: kernels, and why).
    """
    checker = Checker(model.eval(), documents, seed, tolerance)
    used = checker.tolerance
    findings = checker.run()
    if checker.model.device.type == "cuda":
        if half_kernels:
            checker.model.to(torch.bfloat16)
        findings += checker.run_kernels()
    return {
        "kind": checker.kind,
        "passed": all(finding.passed for finding in findings),
        "tolerance": used,
        "not_checked": checker.not_checked,
        "documents": len(checker.spans),
        "seed": seed,
        "checks": [{**asdict(finding), "passed": finding.passed} for finding in findings],
    }


def check_folder(
    folder: str | Path,
    documents: int = 6,
    seed: int = 0,
    tolerance: float | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> dict:
    """The report of `check_model` with the folder's name. By default in fp32, and a GPU's kernels in bf16.

    Raises: UserError for a folder without a model, and as `choose_device`.
    """
    place, precision = choose_device(device, "fp32" if dtype == "auto" else dtype)
    model = load_model(folder).to(place, precision)
    half_kernels = dtype == "auto" and place.type == "cuda" and torch.cuda.is_bf16_supported()
    return {"model": str(folder), **check_model(model, documents, seed, tolerance, half_kernels)}


def format_report(report: dict) -> str:
    """The report as a text table."""
    lines = [
        f"{report['model']} ({report['kind']}), {report['documents']} random documents, seed {report['seed']}"
    ]
    for check in report["checks"]:
        verdict = "ok  " if check["passed"] else "FAIL"
        difference = f"{check['max_difference']:.1e}".rjust(9)
        lines.append(
            f"{verdict} {check['check']:<18} {check['path']:<18} "
            f"largest difference {difference} in {check['compared']} scores"
        )
    lines += [f"     not checked: {path}: {why}" for path, why in report["not_checked"].items()]
    lines.append("all checks passed" if report["passed"] else f"FAILED (tolerance {report['tolerance']:g})")
    return "\n".join(lines)
