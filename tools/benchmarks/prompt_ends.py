"""What it is worth to take back the tokens at a prompt's end (docs/generation.md, Prompts).

    python -m tools.benchmarks.prompt_ends MODEL... --text FILE.jsonl[.gz] [--ends 2000] [--output FILE]

Documents are cut at random characters inside sentences. The same true continuation, up to the end of the
second sentence after the cut, is scored twice by each model (SLLM or token-level): after the prompt's own
tokens, with the continuation tokenized alone; and as the document's tokens, less the nats of all choices that
the prompt leaves. With an SLLM, sampled texts are then compared with a document of the same text.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.command_line import Many, Natural, Positive
from data_prep.common.environment import header, write_result
from data_prep.common.errors import UserError
from data_prep.text.sentences import SentenceSettings, cut_document
from pipeline.data.batch import build_batch
from pipeline.data.windows import Span
from pipeline.evaluation.evaluate import Loaded, load, sentence_settings
from pipeline.generation.api import generate_many
from pipeline.generation.prompt import split_prompt
from pipeline.generation.prompt_end import PromptEnd, find_prompt_end
from pipeline.generation.results import Limits
from pipeline.generation.sampling import Sampling
from pipeline.models.losses import bits_per_byte
from tools.commands import Output, console

BEFORE, AFTER = 300, 400  # characters of a document around a cut
Sentences = list[list[int]]


@dataclass
class Cut:
    """A document cut inside a sentence. `whole`: the document's sentences; `apart`: those of the prompt's own
    tokens and of the rest; `first`: the place of the first token that is scored of each."""

    prompt: str
    complete: Sentences
    end: PromptEnd
    whole: Sentences
    apart: Sentences
    first: tuple[int, int]
    bytes: int
    otherwise: bool  # the prompt's own last tokens are not the document's


def cuts(
    texts: list[str], ends: int, seed: int, loaded: Loaded, settings: SentenceSettings
) -> Iterator[Cut | str]:
    """`ends` cuts, or the reasons why one has no figures."""
    rng, tokenizer = random.Random(seed), loaded.tokenizer
    texts = [text for text in texts if len(text) > 50]
    for _ in range(ends):
        text = rng.choice(texts)
        at = rng.randrange(1, len(text))
        text, at = text[max(0, at - BEFORE) : at + AFTER], min(at, BEFORE)
        prompt = text[:at]
        complete, tail = split_prompt(prompt, tokenizer, settings.to_dict())
        if not tail:
            yield "at a sentence's end"
            continue
        tokens_T, lengths_S = cut_document(text, tokenizer, settings.segmenter_for(), settings)
        whole = [part.tolist() for part in np.split(tokens_T, np.cumsum(lengths_S)[:-1])][: len(complete) + 3]
        if whole[: len(complete)] != complete or len(whole) < len(complete) + 2:
            yield "other sentences"  # the cut changed a sentence's end, or the text ends here
            continue
        whole = whole[: len(complete) + 2]
        open_sentence = tokenizer.decode(whole[len(complete)])
        rest = open_sentence[len(tokenizer.decode(tail)) :]
        apart = [
            *complete,
            [*tail, *(tokenizer.encode(rest).tolist() if rest else [])],
            *whole[len(complete) + 1 :],
        ]
        end = find_prompt_end(complete, tail, tokenizer, settings.max_tokens)
        if end is None or not rest or len(apart[len(complete)]) > settings.max_tokens:
            yield "no room"
            continue
        count = sum(map(len, complete))
        following = rest.encode(), tokenizer.decode_bytes(whole[-1])
        first = count + len(end.certain), count + len(tail)
        otherwise = whole[len(complete)][: len(tail)] != tail
        yield Cut(prompt, complete, end, whole, apart, first, sum(map(len, following)), otherwise)


class Model:
    """Nats of sentences, and logits behind a prompt's tokens, for both kinds."""

    def __init__(self, loaded: Loaded):
        self.loaded, self.model = loaded, loaded.model.eval()

    @torch.inference_mode()
    def nats(self, documents: list[Sentences], firsts: list[int]) -> list[float]:
        """Of each document, the symbols from token number `first` on, sentence ends included."""
        found = []
        for sentences, first in zip(documents, firsts, strict=True):
            lengths = np.asarray([len(sentence) for sentence in sentences])
            losses = self.model(build_batch([Span(np.concatenate(sentences), lengths, False)]))
            nll_N = losses.target_nll_N.double()
            if self.loaded.kind == "sllm":
                first += int((np.cumsum(lengths) <= first).sum())
            found.append(float(nll_N[first:].sum()))
        return found

    @torch.inference_mode()
    def given(self, cut: Cut) -> float:
        """Log-probability of all choices at the prompt's end."""
        root = cut.end.root
        if not root.children:
            return 0.0
        logits_after = self._sllm(cut) if self.loaded.kind == "sllm" else self._lm(cut)
        for branch in (root, *root.below()):
            branch.logits = logits_after([*cut.end.certain, *branch.path])
        return root.mass(torch.zeros_like(root.logits))

    def _sllm(self, cut: Cut) -> Callable[[list[int]], torch.Tensor]:
        model: Any = self.model
        state = model.new_state(1)
        model.read(state, np.zeros(1, dtype=np.int64), [cut.complete])

        def logits_after(tokens: list[int]) -> torch.Tensor:
            decoder = model.decode_begin(state)
            for token in tokens:
                model.decode_step(decoder, token)
            return decoder.logits

        return logits_after

    def _lm(self, cut: Cut) -> Callable[[list[int]], torch.Tensor]:
        model: Any = self.model
        before = [token for sentence in cut.complete for token in sentence]

        def logits_after(tokens: list[int]) -> torch.Tensor:
            # The state that predicts a token more, whatever it is.
            span = Span(np.asarray([*before, *tokens, 0]), np.asarray([len(before) + len(tokens) + 1]), False)
            hidden, _, _ = model.hidden(build_batch([span]))
            return model.model.get_output_embeddings()(hidden[-1:])[0]

        return logits_after


def measure(folder: str, texts: list[str], ends: int, seed: int) -> dict[str, Any]:
    loaded = load(folder)
    settings, model = sentence_settings(loaded.model), Model(loaded)
    found: list[Cut] = []
    left_out: dict[str, int] = {}
    for cut in cuts(texts, ends, seed, loaded, settings):
        if isinstance(cut, str):
            left_out[cut] = left_out.get(cut, 0) + 1
        else:
            found.append(cut)
    rows = np.zeros((len(found), 3))
    for number, cut in enumerate(found):
        with_, without = model.nats([cut.whole, cut.apart], list(cut.first))
        rows[number] = with_ + model.given(cut), without, cut.bytes
    of = {
        "model": folder,
        "kind": loaded.kind,
        "tokenizer": loaded.tokenizer.kind,
        "vocabulary": loaded.tokenizer.vocab_size,
        "ends": len(found),
        "left_out": left_out,
        "otherwise": sum(cut.otherwise for cut in found) / len(found),
        "taken_back": sum(bool(cut.end.root.children) for cut in found) / len(found),
        "bytes": int(rows[:, 2].sum()),
        "with": bits_per_byte(rows[:, 0].sum(), rows[:, 2].sum()),
        "without": bits_per_byte(rows[:, 1].sum(), rows[:, 2].sum()),
    }
    if loaded.kind == "sllm":
        of["written_otherwise"] = written_otherwise(loaded, [cut.prompt for cut in found])
    return of


def written_otherwise(loaded: Loaded, prompts: list[str]) -> int:
    """Texts whose tokens, up to the next word's first, are not those of a document with that text."""
    tokenizer, wrong = loaded.tokenizer, 0
    model: Any = loaded.model
    limits = Limits(1, max_tokens=8)
    many = generate_many(model, tokenizer, prompts, Sampling(temperature=1.0), limits, batch_size=64)
    for prompt, texts in zip(prompts, many, strict=True):
        if isinstance(texts, UserError):
            raise texts
        text = texts[0]
        complete, _ = split_prompt(prompt, tokenizer, model.config.sentence_settings)
        first = sum(map(len, complete)) + text.sentences[0].forced
        new = list(text.sentences[0].tokens)
        start = tokenizer.encode(prompt + text.text).tolist()[:first]
        for count in range(1, len(new) + 1):
            tokens = [*start, *new[:count]]
            data = tokenizer.decode_bytes(tokens)
            written = data.decode(errors="ignore")
            whole = len(written.encode()) == len(data)  # no character is incomplete
            if not written.startswith(prompt) or whole and tokenizer.encode(written).tolist() != tokens:
                wrong += 1
                break
            if re.search(r"\s\S", written[len(prompt) - 1 :]):
                break
    return wrong


def prompt_ends(
    models: Many, /, *, text: str, ends: Positive = 2000, seed: Natural = 1, output: Output = None
) -> dict[str, Any]:
    """What it is worth to take back the tokens at a prompt's end.

    Args:
        models: model folders: SLLMs or our token-level models
        text: documents, .jsonl or .jsonl.gz, with `content`
        ends: places to cut at
    """
    made = header(("torch", "tokenizers", "sentencepiece"))
    opened = gzip.open if text.endswith(".gz") else open
    with opened(text, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["content"] for line in lines]
    found = [measure(folder, texts, ends, seed) for folder in models]
    result = {**made, "text": Path(text).name, "seed": seed, "models": found}
    write_result(result, output)
    return result


if __name__ == "__main__":
    example = "python -m tools.benchmarks.prompt_ends models/sllm --text valid.jsonl.gz"
    raise SystemExit(console("benchmarks.prompt_ends", prompt_ends, example=example))
