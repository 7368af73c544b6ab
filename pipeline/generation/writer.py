"""The generation loop: many texts at once by continuous batching.

Each text has a row of the caches. One decoder step feeds one symbol to every row that is inside a sentence.
Rows whose sentence has ended wait until they are a quarter of all rows, or no row is left to step. Then they
go through encoder and backbone together, because a pass of the backbone reads all of its weights, however few
its rows. A row whose text is finished takes the next prompt.

Each row has its own random generator, and rows influence each other only by rounding (about 1e-6); in a model
laid out as batch invariant not at all. So a text is the same in any batch, unless two choices are closer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from data_prep.common.errors import UserError, counted
from data_prep.text.running_ends import RunningEnds
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import Tokenizer
from pipeline.generation.choice import Choice, ends_by_rule
from pipeline.generation.prefixes import PrefixCache
from pipeline.generation.prompt import WholeDocument, split_by_rule, split_prompt
from pipeline.generation.prompt_end import REJECTED, Branch, PromptEnd, find_prompt_end
from pipeline.generation.protocol import Guide, SentenceModel
from pipeline.generation.results import (
    DOCUMENT_END,
    POSITIONS_EXHAUSTED,
    SENTENCE_LIMIT,
    STOP_STRING,
    STOPPED_BY_CALLER,
    TOKEN_LIMIT,
    Continuation,
    Event,
    Limits,
    Piece,
    Request,
    Sentence,
    TextStream,
)
from pipeline.generation.row import Row
from pipeline.generation.sampling import Sampling
from pipeline.generation.upload import upload

READ_TOKENS = 16_384  # of prompts read in one pass, unless one prompt is longer


class BatchWriter:
    """Generates up to `rows` texts at a time; `run` may be called once."""

    def __init__(
        self,
        model: SentenceModel,
        tokenizer: Tokenizer,
        sampling: Sampling,
        limits: Limits,
        rows: int = 1,
        guide: Guide | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """prefixes: of this model; sentences that it holds are not read again."""
        self._guide = guide
        keeps = prefixes is not None and getattr(model, "keeps_prefixes", False)
        self._reading = {"prefixes": prefixes} if keeps else {}
        self._model, self._tokenizer, self._sampling, self._limits = model, tokenizer, sampling, limits
        self._rows: list[Row | None] = [None] * rows
        config = model.config
        self._bos, self._end = config.bos_token_id, config.eos_token_id
        self._sentence_tokens = min(config.sentence_settings["max_tokens"], config.max_sentence_tokens)
        self.settings = {**config.sentence_settings, "max_tokens": self._sentence_tokens}
        if limits.sentence_tokens is not None and limits.sentence_tokens >= self._sentence_tokens:
            raise UserError(
                f"sentence_tokens {limits.sentence_tokens}: must be below {self._sentence_tokens}"
            )
        self._by_rule = ends_by_rule(config)
        self._rule: RunningEnds | WholeDocument | None = None
        if getattr(config, "ends", None) == "document":
            self._rule = WholeDocument(config.max_sentence_tokens)
        elif self._by_rule and limits.sentence_tokens is None:
            self._rule = RunningEnds(tokenizer, SentenceSettings(**self.settings))
        self._choice = Choice(model, tokenizer, limits, self._rows, guide)
        self._state: Any = None
        self._decoder: Any = None
        self._more = True  # requests may be left
        self._writing: set[int] = set()
        self._waiting: set[int] = set()
        self._cancelled: set[int] = set()

    def cancel(self, number: int) -> None:
        """Drop the text of a request before the next step; no event of it follows."""
        self._cancelled.add(number)

    def run(self, requests: Iterable[Request | None]) -> Iterator[Event]:
        """Process the requests in order; yields (number, event) as events happen: `Piece`, `Sentence`,
        `Continuation`, or the `UserError` of a refused prompt.

        None in place of a request: there is none now, ask again after the next step (a server's texts join
        while others are being generated).
        """
        steps = self._run(iter(requests))
        while True:
            with torch.inference_mode():
                event = next(steps, None)
            if event is None:
                return
            yield event

    @property
    def cached_bytes_per_sentence(self) -> int:
        """Bytes of the backbone's cache per sentence of context."""
        return self._state.cache.bytes_per_place

    @property
    def cached_bytes(self) -> int:
        """Allocated bytes of the backbone's cache."""
        return self._state.cache.bytes

    @property
    def decoder_bytes(self) -> int:
        """Allocated bytes of caches that do not grow with the context: a decoder's, or a stack's windows."""
        return self._decoder.bytes

    def _run(self, requests: Iterator[Request | None]) -> Iterator[Event]:
        self._state = self._model.new_state(len(self._rows))
        self._decoder = self._model.new_decoder(self._state)
        while True:
            if self._cancelled:
                self._drop_cancelled()
            if self._more:
                yield from self._take(requests)
            if not any(self._rows):
                if self._more:  # all requests taken have ended at once or were refused
                    continue
                return
            if self._writing:
                yield from self._step()
            occupied = sum(row is not None for row in self._rows)
            if self._waiting and (not self._writing or 4 * len(self._waiting) >= occupied):
                yield from self._advance()

    def _drop_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, set()
        for at, row in enumerate(self._rows):
            if row is not None and row.request.number in cancelled:
                self._rows[at] = None
                self._writing.discard(at)
                self._waiting.discard(at)

    # Prompts.

    def _take(self, requests: Iterator[Request | None]) -> Iterator[Event]:
        """Give free rows a prompt each, and read these prompts together."""
        free = [at for at, row in enumerate(self._rows) if row is None]
        taken: dict[int, list[list[int]]] = {}
        tokens = 0
        while free:
            try:
                request = next(requests)
            except StopIteration:
                self._more = False
                break
            if request is None:
                break
            try:
                sentences, tail, end = self._split(request.prompt)
            except UserError as error:
                yield request.number, error
                continue
            at = free.pop(0)
            sampling, limits = request.sampling or self._sampling, request.limits or self._limits
            stream = TextStream(limits.stop)
            row = self._rows[at] = Row(request, sampling, limits, stream, bool(tail), tail, end)
            if end is not None and tail:
                row.tail, row.branches = end.certain, [end.root, *end.root.below()]
            taken[at] = sentences
            if sampling.repetition_penalty != 1:
                self._choice.forget(at)
                self._choice.note(at, [token for sentence in (*sentences, row.tail) for token in sentence])
            tokens += sum(map(len, sentences))
            if tokens >= READ_TOKENS:
                yield from self._read(taken)
                taken, tokens = {}, 0
        if taken:
            yield from self._read(taken)

    def _split(self, prompt: str | list[list[int]]) -> tuple[list[list[int]], list[int], PromptEnd | None]:
        """Complete sentences, tokens of the unfinished one, and what may follow them."""
        end = None
        if not isinstance(prompt, str):
            sentences, tail = (prompt[:-1], prompt[-1]) if self._by_rule and prompt else (prompt, [])
        elif self._rule is not None:
            sentences, tail = split_by_rule(prompt, self._tokenizer, self._rule) if prompt else ([], [])
        else:
            sentences, tail = split_prompt(prompt, self._tokenizer, self.settings)
            if self._limits.sentence_tokens is None and not (self._guide and self._guide.keeps_prompt):
                end = find_prompt_end(sentences, tail, self._tokenizer, self._sentence_tokens)
        if len(sentences) > self._model.max_sentences:
            raise UserError(
                f"the prompt has {counted(len(sentences), 'complete sentence')}, but the model's backbone "
                f"has positions for {self._model.max_sentences}: shorten the prompt, for example to its last "
                "sentences"
            )
        tokens = sum(map(len, sentences)) + len(tail)
        if tokens > (most := getattr(self._model, "max_tokens", tokens)):
            raise UserError(
                f"the prompt has {counted(tokens, 'token')}, but the model has positions for {most:,} and "
                "one more sentence: shorten the prompt, for example to its last sentences"
            )
        return sentences, tail, end

    def _read(self, taken: dict[int, list[list[int]]]) -> Iterator[Event]:
        rows = np.asarray(sorted(taken))
        documents = [taken[at] for at in rows]
        ahead = max(self._rows[at].limits.most_sentences for at in rows)
        self._model.read(self._state, rows, documents, ahead, **self._reading)
        begin: list[tuple[int, list[int]]] = []
        odds = self._model.stop_log_odds(self._state, rows).tolist()
        for at, log_odds in zip(rows.tolist(), odds, strict=True):
            row = self._rows[at]
            # A prompt's document may end after its last sentence only, and not before an unfinished one.
            if taken[at] and not row.unfinished:
                ends, row.prompt_stop_probability = self._document_ends(row, log_odds)
                if ends:
                    yield from self._finish(at, DOCUMENT_END)
                    continue
            begin.append((at, row.tail))
        self._begin(begin)

    def _begin(self, rows: list[tuple[int, list[int]]]) -> None:
        """Start the next sentence of each of `rows`, with its forced tokens."""
        if not rows:
            return
        self._model.sentence_begin(self._state, self._decoder, np.asarray([at for at, _ in rows]))
        for at, tail in rows:
            self._rows[at].begin(self._bos, tail)
            self._writing.add(at)

    # One symbol.

    def _step(self) -> Iterator[Event]:
        at_n = np.asarray(sorted(self._writing))
        logits_nV = self._model.sentence_step(self._decoder, at_n, [self._rows[at].feed for at in at_n])
        choosing = [n for n, at in enumerate(at_n) if not self._rows[at].pending]
        for n, at in enumerate(at_n.tolist()):
            if (row := self._rows[at]).pending:
                row.feed = row.pending.pop(0)
            elif row.branches:
                choosing.remove(n)
                row.branches.pop(0).logits = logits_nV[n].clone()  # a replayed step overwrites them
                if row.branches:
                    self._feed(at, row.branches[0].path)
                else:
                    yield from self._choose_at_prompt_end(at)
        if not choosing:
            return
        if len(choosing) < len(at_n):
            chosen = np.asarray(choosing)
            at_n, logits_nV = at_n[chosen], logits_nV[upload(chosen, logits_nV.device)]
        symbol_n, log_probability_n = self._choice.choose(at_n, logits_nV)
        for n, at in enumerate(at_n.tolist()):
            row, symbol, log_probability = self._rows[at], symbol_n[n], log_probability_n[n]
            if row.end is not None:
                branch = Branch([], longer=None, logits=logits_nV[n])
                while not self._accepts(row, branch, [symbol]):
                    symbol, log_probability = self._choose_one(at, branch)
                self._follow(row, [symbol])
            yield from self._record(at, symbol, log_probability, self._tokenizer.decode_bytes([symbol]))

    # The prompt's end.

    def _feed(self, at: int, path: list[int]) -> None:
        """Feed tokens behind the certain ones, in place of those that were fed there."""
        row, kept = self._rows[at], 0
        while kept < min(len(row.fed), len(path) - 1) and row.fed[kept] == path[kept]:
            kept += 1
        self._model.sentence_back(self._decoder, at, len(row.fed) - kept)
        row.fed, row.feed, row.pending = path, path[kept], path[kept + 1 :]

    def _choose_at_prompt_end(self, at: int) -> Iterator[Event]:
        """Choose among all tokens that fit the prompt's end; every branch has its logits."""
        row = self._rows[at]
        root = row.end.root
        # The text's likelihood is given the prompt, whose last tokens were chosen here.
        given = root.mass(self._choice.bias_V) if root.children else 0.0
        while True:
            path: list[int] = []
            last = branch = root
            total = -given
            while branch is not None:
                row.tokens = [*row.tail, *path]
                symbol, log_probability = self._choose_one(at, branch)
                path.append(symbol)
                total += log_probability
                last, branch = branch, branch.children.get(symbol)
            if self._accepts(row, last, path):
                break
        row.forced = len(row.tokens)
        if row.sampling.repetition_penalty != 1:
            self._choice.note(at, path[:-1])
        added = row.end.beyond(path)
        self._follow(row, path)
        yield from self._record(at, path[-1], total, added)
        if at in self._writing and self._rows[at] is row:
            self._feed(at, path)

    def _choose_one(self, at: int, branch: Branch) -> tuple[int, float]:
        """One symbol behind a branch's tokens, and its log-probability without temperature."""
        logits_1V, draws = branch.logits[None], None
        if branch.longer is not None:
            if len(branch.children) == 1 and not branch.longer:
                (symbol,) = branch.children
                return symbol, logits_1V.log_softmax(-1)[0, symbol].item()
            draws = self._rows[at].end_draws
        bias_V = branch.bias(self._choice.bias_V)
        (symbol,), (log_probability,) = self._choice.choose(np.asarray([at]), logits_1V, bias_V, draws)
        return symbol, log_probability

    def _accepts(self, row: Row, branch: Branch, path: list[int]) -> bool:
        """Whether a document may have the chosen tokens; if not, the last one is banned behind its branch."""
        if path[-1] == self._end or row.end.permits(path):
            return True
        branch.banned.append(path[-1])
        if len(branch.banned) == REJECTED:  # little is left: check every token
            usable = np.flatnonzero(self._tokenizer.byte_lengths).tolist()
            branch.banned = [token for token in usable if not row.end.permits([*path[:-1], token])]
            return len(branch.banned) == len(usable)
        return False

    def _follow(self, row: Row, symbols: list[int]) -> None:
        """Note what was chosen; `end` is dropped when nothing can change the tokens at the prompt's end."""
        if symbols[-1] == self._end:
            symbols = symbols[:-1]
        if not row.end.choose(symbols):
            row.end = None

    def _record(self, at: int, symbol: int, log_probability: float, data: bytes) -> Iterator[Event]:
        """Add the next symbol to a row; `data`: the bytes that it adds to the text."""
        row = self._rows[at]
        limits = row.limits
        row.sentence_log_probability += log_probability
        if self._by_rule and symbol == self._end:
            row.ended = True
            yield from self._finish(at, DOCUMENT_END)
            return
        if ends_before := bool(self._by_rule and row.tokens and self._ends_before(row, symbol)):
            row.carry(symbol, log_probability, data)
        if symbol == self._end or ends_before:
            row.ended = not row.closing
            self._writing.remove(at)
            if len(row.sentences) + row.counts == limits.max_sentences:
                yield from self._finish(at, SENTENCE_LIMIT)
            elif self._state.cache.lengths[at] > self._model.max_sentences:
                yield from self._finish(at, POSITIONS_EXHAUSTED)
            else:
                self._waiting.add(at)
            return
        row.tokens.append(symbol)
        row.new_tokens += 1
        row.feed = symbol
        row.closing = len(row.tokens) == self._sentence_tokens and not self._by_rule
        if row.sampling.repetition_penalty != 1:
            self._choice.note(at, [symbol])
        text = row.stream.push(data)
        row.text += text
        yield row.request.number, Piece(text, symbol, log_probability)
        if row.stream.stopped:
            yield from self._finish(at, STOP_STRING)
        elif self._guide and self._guide.stops(row.request.number, symbol, data):
            yield from self._finish(at, STOPPED_BY_CALLER)
        elif row.new_tokens == limits.max_tokens:
            yield from self._finish(at, TOKEN_LIMIT)
        elif isinstance(self._rule, WholeDocument) and self._state.cache.lengths[at] == self._rule.most:
            yield from self._finish(at, POSITIONS_EXHAUSTED)

    def _ends_before(self, row: Row, symbol: int) -> bool:
        if self._rule is None:
            return len(row.tokens) == self._limits.sentence_tokens
        return self._rule.before(row.tokens, symbol)

    # The end of sentences and texts.

    def _advance(self) -> Iterator[Event]:
        """Encode the waiting rows' sentences and feed them to the backbone; their documents end or
        continue."""
        rows = np.asarray(sorted(self._waiting))
        self._waiting.clear()
        self._model.extend(self._state, rows, [self._rows[at].tokens for at in rows])
        begin: list[tuple[int, list[int]]] = []
        odds = self._model.stop_log_odds(self._state, rows).tolist()
        for at, log_odds in zip(rows.tolist(), odds, strict=True):
            row = self._rows[at]
            ends, probability = self._document_ends(row, log_odds)
            if ends:
                yield from self._finish(at, DOCUMENT_END, probability)
            else:
                if row.counts:
                    yield row.request.number, self._sentence(row, probability)
                if row.carried is None:
                    begin.append((at, []))
                    continue
                carried, row.carried = row.carried, None
                row.begin(self._bos, [])
                self._writing.add(at)
                yield from self._record(at, *carried)
        self._begin(begin)

    def _document_ends(self, row: Row, log_odds: float) -> tuple[bool, float]:
        """Whether the document ends here, and the probability of that. Adds the decision to the text's
        log-probability."""
        probability = 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0
        decided = None if self._guide is None else self._guide.ends(row.request.number)
        if self._limits.sentence_tokens is not None:
            ends = False
        elif decided is not None:
            ends = decided
        elif row.sampling.greedy:
            ends = probability > 0.5
        else:
            ends = row.draws.single() < probability
        row.log_probability -= float(np.logaddexp(0, -log_odds if ends else log_odds))
        return ends, probability

    def _sentence(self, row: Row, stop_probability: float | None) -> Sentence:
        sentence = Sentence(
            row.text,
            tuple(row.tokens[row.forced :]),
            row.forced,
            row.ended,
            row.sentence_log_probability,
            stop_probability,
        )
        row.sentences.append(sentence)
        row.log_probability += row.sentence_log_probability
        return sentence

    def _finish(self, at: int, stopped: str, stop_probability: float | None = None) -> Iterator[Event]:
        """Finish a text: emit what was held back, and free its row."""
        row = self._rows[at]
        number = row.request.number
        self._rows[at] = None
        self._writing.discard(at)
        if not row.stream.stopped and (text := row.stream.push(b"", final=True)):
            row.text += text
            yield number, Piece(text, None)
        if row.started:  # not if the document ends after a complete prompt
            yield number, self._sentence(row, stop_probability)
        yield (
            number,
            Continuation(
                row.request.prompt,
                "".join(sentence.text for sentence in row.sentences),
                tuple(row.sentences),
                stopped,
                row.request.seed,
                row.prompt_stop_probability,
                row.log_probability,
            ),
        )
