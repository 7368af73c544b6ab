"""An SLLM of either layout as `AutoModelForCausalLM` gives it: token ids in, token ids out.

`generate` of ids takes what Hugging Face documents for every causal LM. Transformers prepares lengths, logits
processors, stopping criteria and the streamer; our own loop (`generation.writer`) chooses the ids. The
end-of-text id is the document's end. A predicted sentence end is no id: logits processors see it in the
column of the end-of-text id and cannot forbid it. Where a rule ends sentences, the column is the document's.

`generate("text")` is the text API of `SLLM.generate`: the type of the first argument decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    PrefixConstrainedLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data_prep.common.errors import UserError
from data_prep.common.files import keep_umask
from data_prep.text.hugging_face import write_hugging_face
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import Tokenizer
from pipeline.data.batch import Batch, build_batch
from pipeline.data.windows import document_spans
from pipeline.evaluation.evaluate import running_ends
from pipeline.generation.choice import ends_by_rule
from pipeline.generation.results import DOCUMENT_END, POSITIONS_EXHAUSTED, Continuation, Limits, Request
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.interop.texts import cut_text, decode_ids, spell, unpadded
from pipeline.models.folders import load_model_tokenizer
from pipeline.models.losses import LossSums
from pipeline.models.sllm import SLLM
from pipeline.models.stack import StackLM

# Settings of `generate` that a sentence-level model cannot follow, and values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
    "use_cache": (True,),
    "penalty_alpha": (),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "cache_implementation": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "exponential_decay_length_penalty": (),
    "token_healing": (False,),  # always done, by the writer
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
# Arguments of `generate` that do not come with the settings.
REFUSED_INPUTS = (
    "assistant_model",
    "assistant_tokenizer",
    "inputs_embeds",
    "past_key_values",
    "negative_prompt_ids",
    "position_ids",
    "custom_generate",
)


class IdGuide:
    """The ids of R texts (`generation.protocol.Guide`), each with its processors and criteria."""

    def __init__(
        self,
        prompts_RL: Tensor,
        tokenizer: Tokenizer,
        processors: list[Any],
        criteria: StoppingCriteriaList,
        end: int,
        may_end: bool,
        vocabulary: int,
        by_rule: bool,
        on_id: Callable[[int], None],
    ):
        """`end`: the end-of-text id; `may_end`: whether it ends a text; `vocabulary`: ids that have logits;
        `by_rule`: no symbol ends a sentence; `on_id`: gets each new id."""
        self._ids: list[Tensor] = [row[None] for row in prompts_RL]
        self._prompt_length = prompts_RL.shape[1]
        self._tokenizer, self._criteria, self._end = tokenizer, criteria, end
        self._may_end, self._vocabulary, self._on_id = may_end, vocabulary, on_id
        self._by_rule = by_rule
        self._processors = [[_of_row(each, row) for each in processors] for row in range(len(prompts_RL))]
        self.keeps_prompt = bool(processors)

    def new_ids(self, number: int) -> Tensor:
        """int64 [n]."""
        return self._ids[number][0, self._prompt_length :]

    def _process(self, number: int, logits_V: Tensor) -> Tensor:
        scores = logits_V[None]
        for processor in self._processors[number]:
            scores = processor(self._ids[number], scores)
        return scores[0]

    def adjust(self, number: int, logits_V: Tensor) -> Tensor:
        if not self._processors[number] and (self._may_end or not self._by_rule):
            return logits_V
        adjusted_V = self._process(number, logits_V.clone()).clone()
        if self._by_rule and not self._may_end:
            adjusted_V[self._end] = -torch.inf
        elif not self._by_rule and adjusted_V[self._end].isneginf():
            # The id is forbidden, not the sentence end: it keeps its distance from the likeliest id.
            best = adjusted_V.argmax()
            shift = adjusted_V[best] - logits_V[best]
            adjusted_V[self._end] = logits_V[self._end] + (shift if shift.isfinite() else 0.0)
        if adjusted_V.isneginf().all():
            raise UserError("generate: the logits processors leave no id to choose")
        return adjusted_V

    def ends(self, number: int) -> bool | None:
        if not self._may_end:
            return False
        if not self._processors[number]:
            return None
        same_V = torch.zeros(self._vocabulary, device=self._ids[number].device)
        allowed_V = ~self._process(number, same_V).isneginf()
        return None if allowed_V[self._end] and allowed_V.sum() > 1 else bool(allowed_V[self._end])

    def stops(self, number: int, token: int, data: bytes) -> bool:
        # At the prompt's end the token may begin inside the prompt: only the bytes behind it are new.
        whole = self._tokenizer.decode_bytes([token]) == data
        return any(self.add(number, new) for new in ([token] if whole else spell(data, self._tokenizer)))

    def add(self, number: int, new: int) -> bool:
        """Append one id; True stops the text."""
        ids = self._ids[number]
        self._ids[number] = torch.cat([ids, ids.new_tensor([[new]])], dim=1)
        self._on_id(new)
        return bool(self._criteria(self._ids[number], None).any())


def _of_row(processor: Any, row: int) -> Any:
    """A logits processor that sees one row as it sees it in the batch."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    return processor


def _take_sampling(processors: LogitsProcessorList, do_sample: bool) -> tuple[Sampling, list[Any]]:
    """The settings that our own sampling follows, and the processors that are left."""
    ours = {
        TemperatureLogitsWarper: "temperature",
        TopKLogitsWarper: "top_k",
        TopPLogitsWarper: "top_p",
        MinPLogitsWarper: "min_p",
        RepetitionPenaltyLogitsProcessor: "penalty",
    }
    found: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    left = []
    for processor in processors:
        name = ours.get(type(processor))
        if name is None or (name != "temperature" and name in found) or (name != "penalty" and not do_sample):
            left.append(processor)
        else:
            found[name] = getattr(processor, name)
    found["repetition_penalty"] = found.pop("penalty", 1.0)
    return Sampling(**found), left


class SentenceGenerationMixin(GenerationMixin):
    """`generate` and `forward` of token ids, for a sentence-level model (`generation.protocol`).

    text_tokenizer: the model's exact tokenizer; loaded from the model's folder at first use.
    """

    text_tokenizer: Tokenizer | None = None
    config: Any
    name_or_path: str
    training: bool
    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Continue token ids as every causal LM does, or a text (`SLLM.generate`).

        Args:
            inputs: int64 [R, L] ids, padded on the left, or a text.
            args, kwargs: `GenerationMixin.generate`'s for ids, `SLLM.generate`'s for a text. With ids, too,
                `seed`: row r samples with seed + r, as `sllm generate` does; None draws one.
        Returns: int64 [R · num_return_sequences, L + new], or a text.
        Raises: UserError for what a sentence-level model cannot follow.
        """
        if isinstance(inputs, str) or "prompt" in kwargs:
            prompt = kwargs.pop("prompt", inputs)
            return super(GenerationMixin, self).generate(prompt, *args, **kwargs)  # type: ignore[misc]
        settings = kwargs.get("generation_config") or next(iter(args), None) or self.generation_config
        given = {name: kwargs.get(name, getattr(settings, name, None)) for name in REFUSED}
        given |= {name: kwargs.get(name) for name in REFUSED_INPUTS}
        for name, value in given.items():
            if value is not None and value not in REFUSED.get(name, ()):
                value = f"={value!r}" if name in REFUSED else ""
                raise UserError(f"generate: {name}{value} has no meaning for a sentence-level model")
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        model_kwargs.pop("seed", None)
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """The writer keeps its own cache."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        attention_mask: Tensor | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        tokenizer = self._exact_tokenizer()
        prompts = [
            decode_ids(ids, f"row {row} of input_ids", tokenizer)
            for row, ids in enumerate(unpadded(input_ids, attention_mask))
        ]
        ends, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        sampling, processors = _take_sampling(logits_processor, generation_config.do_sample)
        if seed is None:
            seed = int(torch.randint(1 << 31, ())) if generation_config.do_sample else 0
        put = (lambda new: None) if streamer is None else (lambda new: streamer.put(torch.tensor([new])))
        end = self.config.eos_token_id
        may_end = ends is not None and end in ends.tolist()
        by_rule, vocabulary = ends_by_rule(self.config), self.config.vocab_size
        guide = IdGuide(
            input_ids, tokenizer, processors, stopping_criteria, end, may_end, vocabulary, by_rule, put
        )
        # Criteria and positions are the limits.
        writer = BatchWriter(self, tokenizer, sampling, Limits(1 << 30), len(prompts), guide)  # type: ignore[arg-type]
        requests = (Request(row, prompt, seed + row) for row, prompt in enumerate(prompts))
        for row, event in writer.run(requests):
            if isinstance(event, UserError):
                raise UserError(f"generate: row {row} of input_ids: {event}")
            if not isinstance(event, Continuation):
                continue
            if event.stopped == DOCUMENT_END:
                guide.add(row, end)
            elif event.stopped == POSITIONS_EXHAUSTED:
                warnings.warn(f"generate: row {row} stops early: {event.stopped}", stacklevel=4)
        if streamer is not None:
            streamer.end()
        new = [guide.new_ids(row) for row in range(len(prompts))]
        width = input_ids.shape[1]
        sequences = input_ids.new_full(
            (len(new), width + max(map(len, new))), end if pad is None else int(pad)
        )
        sequences[:, :width] = input_ids
        for row, ids in enumerate(new):
            sequences[row, width : width + len(ids)] = ids
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def _exact_tokenizer(self) -> Tokenizer:
        if self.text_tokenizer is None:
            if not self.name_or_path:
                raise UserError("this model was not loaded from a folder: set its text_tokenizer")
            self.text_tokenizer = load_model_tokenizer(self.name_or_path)
        return self.text_tokenizer

    def forward(
        self,
        input_ids: Tensor | Batch | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        want_correct: bool = False,
        vectors_Sd: Tensor | None = None,
    ) -> LossSums | CausalLMOutput | tuple[Tensor]:
        """The loss of texts given as ids; of a `Batch`, `SLLM.forward`.

        The loss is that of `sllm evaluate`: nats of tokens, sentence ends and stop decisions, per token.
        A text ends its document if its last id is the end-of-text id.

        Args:
            labels: int64 [R, L]: the ids, or -100 where they do not count; all must count in training.
        Raises: UserError without labels: a sentence-level model gives no logits id by id.
        """
        if isinstance(input_ids, Batch):
            return super(GenerationMixin, self).forward(input_ids, want_correct, vectors_Sd)  # type: ignore[misc]
        if input_ids is None or labels is None:
            raise UserError("forward: a sentence-level model gives a loss only: pass input_ids and labels")
        counted = labels != -100
        if labels.shape != input_ids.shape or (labels != input_ids)[counted].any():
            raise UserError("forward: labels must be the input_ids, or -100 where they do not count")
        tokenizer = self._exact_tokenizer()
        cut = SentenceSettings(**BatchWriter(self, tokenizer, Sampling(), Limits()).settings)  # type: ignore[arg-type]
        spans, counted_T = [], []
        rows = zip(unpadded(input_ids, attention_mask), unpadded(counted, attention_mask), strict=True)
        for row, (ids, counts) in enumerate(rows):
            ends = len(ids) > 1 and int(ids[-1]) == self.config.eos_token_id
            ids = ids[: len(ids) - ends]
            text = decode_ids(ids, f"row {row} of input_ids", tokenizer)
            if not text:
                continue
            tokens_T, lengths_S = cut_text(text, tokenizer, cut)
            # The text's own tokens may differ from the ids given: a token counts where its last byte does.
            id_of_T = np.searchsorted(
                np.cumsum(tokenizer.byte_lengths[ids.cpu().numpy()]),
                np.cumsum(tokenizer.byte_lengths[tokens_T]),
            )
            counted_T.append(counts.cpu().numpy()[id_of_T])
            *inner, last = document_spans(tokens_T, lengths_S, self.config.window_tokens)
            spans += [*inner, replace(last, document_end=ends)]
        if rule := running_ends(self, tokenizer):  # type: ignore[arg-type]
            spans = [span.cut_again(rule) for span in spans]
        if not spans:
            raise UserError("forward: input_ids hold no text")
        losses: Any = self.forward(build_batch(spans).to(input_ids.device))
        is_counted_T = torch.from_numpy(np.concatenate(counted_T)).to(input_ids.device)
        tokens = int(is_counted_T.sum())
        if self.training and torch.is_grad_enabled():
            if tokens < len(is_counted_T):
                raise UserError("forward: in training all ids must count: pass the input_ids as labels")
            loss = losses.objective / tokens
        else:
            is_end_N = losses.is_end_N
            counted_N = torch.zeros_like(is_end_N)
            counted_N[~is_end_N] = is_counted_T
            ends_N = is_end_N.nonzero()[:, 0]
            counted_N[ends_N] = counted_S = counted_N[ends_N - 1]
            nats = losses.target_nll_N[counted_N].sum()
            if losses.stop_nll_S is not None:
                nats = nats + losses.stop_nll_S[counted_S].sum()
            loss = nats / max(1, tokens)
        return (loss,) if return_dict is False else CausalLMOutput(loss=loss)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As Hugging Face's, with the exact tokenizer; the files keep the umask."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        keep_umask(Path(save_directory))
        if self.text_tokenizer is not None or self.name_or_path:
            tokenizer = self._exact_tokenizer()
            tokenizer.save(Path(save_directory) / "tokenizer")
            write_hugging_face(tokenizer, save_directory)


class SLLMForCausalLM(SentenceGenerationMixin, SLLM):  # type: ignore[misc]
    """An `SLLM` with Hugging Face's interface of a causal language model."""


class StackForCausalLM(SentenceGenerationMixin, StackLM):  # type: ignore[misc]
    """The same of a `StackLM`."""


for model_class in (SLLMForCausalLM, StackForCausalLM):
    AutoModelForCausalLM.register(model_class.config_class, model_class)
    # The pipeline "text-generation" warns of models that are not named here.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_class.config_class.model_type] = model_class.__name__
