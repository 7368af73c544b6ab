"""Requests and answers of OpenAI's API (platform.openai.com/docs/api-reference), as far as a sentence-level
model can give what they ask for."""

from __future__ import annotations

import json
from itertools import dropwhile
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from data_prep.common.errors import UserError, counted
from pipeline.generation.results import DOCUMENT_END, STOP_STRING, Continuation, Limits, Request
from pipeline.generation.sampling import Sampling

Body = TypeVar("Body", bound="Generating")
Item = TypeVar("Item")


class _First(FailFast):
    """Stop at a list's first problem: all could be a million."""

    __hash__ = object.__hash__  # as a member of a union must have


Many = Annotated[list[Item], _First()]
MOST_TEXTS = 128  # of one request
MOST_STOPS = 16  # every new token is compared with each
MOST_SHOWN = 500  # characters of a message, which may quote the request
NOT_MEANT = "this server cannot do that; leave it out"


class ApiError(Exception):
    """An answer in OpenAI's error format."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        # Names in a request may hold lone surrogates, which no answer can.
        message, param = (
            None if text is None else text[:MOST_SHOWN].encode("utf-8", "backslashreplace").decode()
            for text in (message, param)
        )
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # a client's default; nothing is obfuscated


class Generating(_Strict):
    """What completions and chat share. `top_k`, `min_p`, `repetition_penalty`, `max_sentences` are ours."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_TEXTS)
    stop: str | Many[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    max_sentences: int | None = Field(None, ge=1)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def require_meant(self) -> None:
        """Raises: ApiError for what would silently mean something else."""
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise ApiError(400, f"{name}: {NOT_MEANT}", name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for stream: true", "stream_options")

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def requests(self, prompts: list[str], most_tokens: int, default_tokens: int) -> list[Request]:
        """`n` texts of each prompt. Raises: ApiError."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MOST_STOPS:
            raise ApiError(400, f"stop: at most {MOST_STOPS} strings", "stop")
        tokens = self.max_tokens or default_tokens
        if tokens > most_tokens:
            raise ApiError(
                400, f"max_tokens {tokens}: this server writes at most {most_tokens}", "max_tokens"
            )
        temperature = 1.0 if self.temperature is None else self.temperature
        n = self.n or 1
        if n * len(prompts) > MOST_TEXTS:
            raise ApiError(
                400, f"{counted(n * len(prompts), 'text')}: a request has at most {MOST_TEXTS}", "n"
            )
        try:
            sampling = Sampling(
                temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty or 1.0
            )
            limits = Limits(self.max_sentences or tokens, tokens, tuple(stop))
        except UserError as error:
            raise ApiError(400, str(error)) from None
        seed = self.seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        seeds = ((seed + number) % (1 << 63) for number in range(n * len(prompts)))
        return [Request(0, prompt, next(seeds), sampling, limits) for prompt in prompts for _ in range(n)]


class CompletionRequest(Generating):
    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = None
    suffix: str | None = None

    def require_meant(self) -> None:
        super().require_meant()
        if self.suffix:
            raise ApiError(400, f"suffix: {NOT_MEANT}", "suffix")
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of: {NOT_MEANT}", "best_of")
        if (self.logprobs or 0) > 1:
            raise ApiError(400, "logprobs: at most 1, the chosen token's own", "logprobs")

    def prompts(self, tokenizer: Any, most_tokens: int) -> list[str]:
        """The prompts as text. Raises: ApiError."""
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if not given:
            raise ApiError(400, "prompt: there is none", "prompt")
        if isinstance(given[0], int):
            given = [given]
        require_short(max((len(each) for each in given if not isinstance(each, str)), default=0), most_tokens)
        prompts = [each if isinstance(each, str) else _decode(each, tokenizer) for each in given]
        require_text(prompts, "prompt")
        return prompts


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return "".join(parts)


class ChatRequest(Generating):
    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    def require_meant(self) -> None:
        super().require_meant()
        if self.logprobs:
            raise ApiError(400, "logprobs: for completions only", "logprobs")
        self.max_tokens = self.max_completion_tokens or self.max_tokens


def require_short(tokens: int, most: int) -> None:
    """Raises: ApiError for a prompt that is too long."""
    if tokens > most:
        message = f"the prompt has {counted(tokens, 'token')}; this server takes {most}"
        raise ApiError(400, message, "prompt", "context_length_exceeded")


def require_text(texts: list[str], param: str) -> None:
    """Raises: ApiError for lone surrogates, which JSON can hold and no text has."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param}: a lone surrogate is not text", param) from None


def _decode(tokens: list[int], tokenizer: Any) -> str:
    """The text of token ids, which may follow control symbols. Raises: ApiError."""
    if any(not 0 <= token < tokenizer.vocab_size for token in tokens):
        raise ApiError(400, f"prompt: token ids are from 0 to {tokenizer.vocab_size - 1}", "prompt")
    tokens = list(dropwhile(lambda token: tokenizer.byte_lengths[token] == 0, tokens))
    if any(tokenizer.byte_lengths[token] == 0 for token in tokens):
        raise ApiError(400, "prompt: there is a control symbol inside the token ids", "prompt")
    try:
        return tokenizer.decode_bytes(tokens).decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "prompt: the token ids begin or end inside a character", "prompt") from None


def parse(kind: type[Body], data: bytes) -> Body:
    """A request's body. Raises: ApiError that names the first problem."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        values = json.loads(data.decode("utf-8"), parse_constant=constant)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error) or 'nested too deeply'}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        unknown = first.get("type") == "extra_forbidden"
        where = ".".join(map(str, first["loc"] if unknown else first["loc"][:1]))
        what = "is unknown here" if unknown else first["msg"]
        raise ApiError(400, f"{where or 'the body'}: {what}", where or None) from None
    body.require_meant()
    return body


def finish_reason(text: Continuation) -> str:
    return "stop" if text.stopped in (DOCUMENT_END, STOP_STRING) else "length"


def new_tokens(text: Continuation) -> int:
    return sum(len(sentence.tokens) for sentence in text.sentences)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
    }
