"""A model folder as a model of lm-evaluation-harness: `--model sllm --model_args pretrained=DIR`.

A context and its continuation are one text, cut and tokenized as in training. Scored are the tokens that
reach into the continuation, and the sentence ends in it. As in the harness's own models, white space at the
end of the context belongs to the continuation. docs/evaluation.md says what that means for a context that
ends inside a sentence or a token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from data_prep.common.errors import UserError, counted, log
from data_prep.common.language import detect_language
from data_prep.text.hugging_face import write_hugging_face
from pipeline.data.windows import document_spans
from pipeline.evaluation.evaluate import (
    batches,
    load,
    running_ends,
    score,
    sentence_settings,
    window_limit,
)
from pipeline.evaluation.scores import STOP, Window, document_windows
from pipeline.generation.api import generate_many
from pipeline.generation.results import Limits
from pipeline.generation.sampling import Sampling
from pipeline.interop.texts import cut_text
from pipeline.models.folders import KINDS, read_config
from pipeline.models.inference import lay_out
from pipeline.models.sentence_lm import SentenceLM

DEFAULT_BATCH = 8  # texts generated at once
DEFAULT_NEW_TOKENS = 256  # as the harness's other models
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


class _Part(NamedTuple):
    """A window of one request, and which of its symbols count."""

    window: Window
    counted_T: np.ndarray  # tokens
    counted_S: np.ndarray  # sentence ends


@register_model("sllm")
class FolderLM(LM):
    """An SLLM, or a token-level model scored in the same way."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        batch_tokens: int = 8192,
        window_tokens: int | None = None,
        int8: bool = False,
        **others: Any,
    ):
        """
        Args:
            pretrained: the model folder.
            batch_size: texts generated at once; `auto` is the default.
            batch_tokens: tokens scored at once.
            window_tokens: longest context and continuation (default: as `sllm evaluate`).
            int8: weights in 8 bits, on a CPU.
        """
        super().__init__()
        if others:
            raise UserError(f"--model_args {next(iter(others))}: unknown to the models of this project")
        require_predictions(pretrained)
        if device and device.split(":")[0] not in ("cpu", "cuda"):
            raise UserError(f"--device {device}: must be cpu or cuda")
        # The harness's default is cuda, whether there is a GPU or not.
        self._loaded = load(str(pretrained), int8, "cpu" if device == "cpu" else "auto")
        self._model = self._loaded.model
        if device and next(self._model.parameters()).device.type == "cuda":
            self._model = self._model.to(device)
        self._batch_size = int(batch_size) if str(batch_size).isdigit() else DEFAULT_BATCH
        self._batch_tokens = int(batch_tokens)
        self._window = window_limit(self._model, self._loaded.kind, window_tokens)
        self._cut = sentence_settings(self._model)
        self._rule = running_ends(self._model, self._loaded.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self._loaded.tokenizer.folder)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        raise UserError("--apply_chat_template: these models continue texts and have no chat template")

    # Scores.

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether every symbol is the likeliest."""
        nats, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
        # Parts are taken as batches need them, in the order of the windows.
        parts: list[_Part] = []

        def windows() -> Iterator[Window]:
            shortened = 0
            for number, request in enumerate(tqdm(requests, desc="loglikelihood", disable=disable_tqdm)):
                found, whole = self._parts(number, *request.args)
                shortened += not whole
                parts.extend(found)
                yield from (part.window for part in found)
            self._report_shortened(shortened)

        device = next(self._model.parameters()).device
        for batch, group in batches(windows(), self._batch_tokens, self._rule):
            losses = self._model(batch.to(device), want_correct=True)
            of_batch, parts[:] = parts[: len(group)], parts[len(group) :]
            is_end_N = losses.is_end_N.cpu().numpy()
            counted_N = np.zeros(len(is_end_N), dtype=bool)
            counted_N[~is_end_N] = np.concatenate([part.counted_T for part in of_batch])
            if self._loaded.kind == "sllm" and self._rule is None:
                counted_N[is_end_N] = np.concatenate([part.counted_S for part in of_batch])
                symbols = [len(part.counted_T) + len(part.counted_S) for part in of_batch]
            else:
                symbols = [len(part.counted_T) for part in of_batch]
            request_N = np.repeat([part.window.document for part in of_batch], symbols)[counted_N]
            nll_N = losses.target_nll_N.double().cpu().numpy()[counted_N]
            correct_N = losses.target_correct_N.cpu().numpy()[counted_N]
            np.add.at(nats, request_N, nll_N)
            np.logical_and.at(greedy, request_N, correct_N)
        answers = [(-float(x), bool(y)) for x, y in zip(nats, greedy, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def _parts(self, number: int, context: str, continuation: str) -> tuple[list[_Part], bool]:
        """The windows of a request, and whether they hold the whole context."""
        text, tokenizer = context + continuation, self._loaded.tokenizer
        tokens_T, lengths_S = cut_text(text, tokenizer, self._cut)
        if not len(tokens_T):
            return [], True
        border = len(context.rstrip().encode())
        cu = np.concatenate([[0], np.cumsum(lengths_S, dtype=np.int64)])
        end_of_T = np.cumsum(tokenizer.byte_lengths[tokens_T])
        end_of_S = end_of_T[cu[1:] - 1]
        segmenter = self._cut.segmenter_for(detect_language(text))
        counted_T, counted_S = end_of_T > border, end_of_S > border
        if border in end_of_S:  # a context that is complete by itself includes its last sentence's end
            counted_S[end_of_S == border] = not segmenter.is_complete(context)
        counted_S[-1] &= segmenter.is_complete(text)
        # What does not fit: the context loses its first sentences.
        first_counted = int(np.searchsorted(end_of_S, border, side="right"))
        first = int(np.searchsorted(cu, cu[-1] - self._window))
        first = min(first, first_counted, len(lengths_S) - 1)
        parts, sentence = [], first
        for span in document_spans(tokens_T[cu[first] :], lengths_S[first:], self._window):
            after = sentence + len(span.sentence_lengths)
            # Whether the document ends here is not asked.
            window = Window(replace(span, document_end=False), number, sentence)
            parts.append(_Part(window, counted_T[cu[sentence] : cu[after]], counted_S[sentence:after]))
            sentence = after
        return parts, first == 0

    def _report_shortened(self, count: int) -> None:
        if count:
            lost = counted(count, "context lost its first sentences", "contexts lost their first sentences")
            log(f"lm-eval: {lost}: {counted(self._window, 'token is', 'tokens are')} the most")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, with its end, in the windows of `sllm evaluate`."""

        def windows() -> Iterator[Window]:
            for number, request in enumerate(tqdm(requests, desc="rolling", disable=disable_tqdm)):
                (text,) = request.args
                cut = cut_text(text, self._loaded.tokenizer, self._cut)
                yield from document_windows(*cut, self._window, number, "", "")

        found = score(self._model, self._loaded.kind, self._loaded.tokenizer, windows(), self._batch_tokens)
        nothing = np.zeros(STOP + 1)
        answers = [-float(found.rows.get(n, nothing)[: STOP + 1].sum()) for n in range(len(requests))]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    # Texts.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to a stop string, which is left out."""
        if not isinstance(self._model, SentenceLM):
            return self._hugging_face().generate_until(requests, disable_tqdm=disable_tqdm)
        lay_out(self._model)
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda n: repr(requests[n].args[1]))
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm)
        for _, group in groupby(order, key=lambda n: repr(requests[n].args[1])):
            numbers = list(group)
            sampling, limits = _settings(requests[numbers[0]].args[1])
            shortened = 0
            prompts = []
            for number in numbers:
                prompt, whole = self._last_window(requests[number].args[0], limits.max_tokens)
                prompts.append(prompt)
                shortened += not whole
            self._report_shortened(shortened)
            # The harness sets torch's seed.
            seed = 0 if sampling.greedy else int(torch.randint(1 << 31, ()))
            model: Any = self._model
            many = generate_many(
                model, self._loaded.tokenizer, prompts, sampling, limits, self._batch_size, seed=seed
            )
            for number, texts in zip(numbers, many, strict=True):
                if isinstance(texts, UserError):
                    raise texts
                answers[number] = texts[0].text
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[0].text)
                bar.update()
        bar.close()
        return [answers[number] for number in range(len(requests))]

    def _last_window(self, context: str, new_tokens: int) -> tuple[str, bool]:
        """The context's last sentences that leave room for new tokens, and whether it is whole."""
        tokenizer = self._loaded.tokenizer
        tokens_T, lengths_S = cut_text(context, tokenizer, self._cut)
        room = max(self._window - new_tokens, self._window // 2)
        if len(tokens_T) <= room:
            return context, True
        cu = np.concatenate([[0], np.cumsum(lengths_S, dtype=np.int64)])
        first = min(int(np.searchsorted(cu, cu[-1] - room)), len(lengths_S) - 1)
        return tokenizer.decode(tokens_T[cu[first] :]), False

    def _hugging_face(self) -> Any:
        """The harness's own model, of the same folder."""
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        folder, tokenizer = self._loaded.folder, self._loaded.tokenizer
        device = str(next(self._model.parameters()).device)
        own = None
        if tokenizer.folder != Path(folder):  # folders of earlier releases have no tokenizer at the root
            with tempfile.TemporaryDirectory() as made:
                write_hugging_face(tokenizer, made)
                own = AutoTokenizer.from_pretrained(made)
        return HFLM(folder, tokenizer=own, device=device, batch_size=self._batch_size)


def require_predictions(folder: str | Path) -> None:
    """Raises: UserError for a folder whose model predicts no text."""
    if KINDS.get(read_config(folder).get("model_type", "")) == "vae":
        raise UserError(f"model folder {folder}: a SentenceVAE rebuilds sentences and predicts no text")


def _settings(given: dict[str, Any]) -> tuple[Sampling, Limits]:
    """A request's settings. Raises: UserError for settings that are not known here."""
    settings = normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS)
    stop, most = settings.pop("until", None) or [], settings.pop("max_gen_toks")
    temperature = float(settings.pop("temperature", 0.0) or 0.0)
    if settings.pop("do_sample", False):
        temperature = temperature or 1.0
    filters = {name: settings.pop(name) for name in SAMPLING if settings.get(name) is not None}
    if settings:
        raise UserError(f"--gen_kwargs {next(iter(settings))}: unknown to the models of this project")
    # The document's end and the limit of tokens are the ends.
    limits = Limits(1 << 30, most, tuple(filter(None, [stop] if isinstance(stop, str) else stop)))
    return Sampling(temperature, **filters), limits
