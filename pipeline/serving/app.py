"""The HTTP side: OpenAI's routes, `/health`, `/metrics` and a page to try the model, on Starlette."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from data_prep.common.errors import UserError, counted, first_line, log
from pipeline.serving.answers import Call, Chat, Completion, Form, Texts
from pipeline.serving.batcher import Batcher, Busy, Closing
from pipeline.serving.metrics import Metrics
from pipeline.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Generating,
    new_tokens,
    parse,
    require_short,
    require_text,
    usage,
)

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SHORT_PROMPTS = 4000  # characters that are tokenized at once; more would hold up other clients
RETRY_AFTER = 1  # seconds
STALLED = 5.0  # seconds for which a reader may hold a finished or overdue answer


@dataclass(frozen=True)
class Settings:
    """How the server answers. body_bytes: of a request. deadline: seconds for a request, from its first
    byte to its last. key: what clients must send, if any. chat_template: Jinja, or None."""

    key: str | None = None
    body_bytes: int = 1 << 20
    prompt_tokens: int = 16_384
    most_tokens: int = 4096
    deadline: float = 300.0
    chat_template: str | None = None


class Server:
    """The routes of one batcher."""

    def __init__(self, batcher: Batcher, settings: Settings) -> None:
        self.batcher, self.settings, self.metrics = batcher, settings, Metrics(batcher)
        self._template = _compiled(settings.chat_template)
        files = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript")}
        files |= {"/style.css": ("style.css", "text/css"), "/icon.svg": ("icon.svg", "image/svg+xml")}
        self.app = Starlette(
            routes=[
                *(Route(path, _file(*file)) for path, file in files.items()),
                Route("/health", self.health),
                Route("/metrics", self._guarded(self.show_metrics)),
                Route("/v1/models", self._guarded(self.models)),
                Route("/v1/models/{name}", self._guarded(self.model)),
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error},
        )
        self.app.router.redirect_slashes = False  # to the host that the request names

    def reload(self, chat_template: str | None) -> None:
        """Read the model folder again, with a new template. Raises: UserError; the old ones stay."""
        template = _compiled(chat_template)
        self.batcher.reload()
        self._template = template

    # Every route of the API.

    def _guarded(
        self, handler: Callable[[HttpRequest, Call], Awaitable[Response]]
    ) -> Callable[[HttpRequest], Awaitable[Response]]:
        """Key, deadline, errors in OpenAI's format, a line in the log."""

        async def answer(request: HttpRequest) -> Response:
            call = Call(request.scope["path"], asyncio.get_running_loop().time() + self.settings.deadline)
            try:
                self._require_key(request)
                with anyio.fail_after(self.settings.deadline):
                    response = await handler(request, call)
            except Exception as error:
                response = self._failure(error)
            if not isinstance(response, Stream):
                self.finished(call, response.status_code)
            return response

        return answer

    def _require_key(self, request: HttpRequest) -> None:
        if self.settings.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.settings.key.encode())
        if not right or scheme.lower() != "bearer":
            raise ApiError(
                401, "no valid API key: send it as Authorization: Bearer KEY", code="invalid_api_key"
            )

    def _failure(self, error: Exception) -> Response:
        error = _as_api_error(error)
        return JSONResponse(error.body, error.status, error.headers)

    def finished(self, call: Call, status: int) -> None:
        seconds = time.perf_counter() - call.began
        self.metrics.finished(call.path, status, call.facts)
        facts = {
            "id": call.id,
            "path": call.path,
            "status": status,
            "seconds": round(seconds, 4),
            **call.facts,
        }
        log(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}))

    # The routes.

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self.batcher.loaded.name})

    async def show_metrics(self, _: HttpRequest, __: Call) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: HttpRequest, __: Call) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: HttpRequest, _: Call) -> Response:
        self._require_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        loaded = self.batcher.loaded
        return {"id": loaded.name, "object": "model", "created": loaded.created, "owned_by": "local"}

    def _require_model(self, name: str) -> None:
        ours = self.batcher.loaded.name
        if name != ours:
            raise ApiError(404, f"there is no model {name!r} here, only {ours!r}", "model", "model_not_found")

    async def completions(self, request: HttpRequest, call: Call) -> Response:
        body = parse(CompletionRequest, await self._body(request))
        self._require_model(body.model)
        prompts = body.prompts(self.batcher.loaded.tokenizer, self.settings.prompt_tokens)
        return await self._answer(
            request, call, body, prompts, Completion(body, self.batcher.loaded.tokenizer)
        )

    async def chat(self, request: HttpRequest, call: Call) -> Response:
        if self._template is None:
            raise ApiError(
                400,
                "this model has no chat template: it continues text; use /v1/completions, or start the "
                "server with --chat-template",
            )
        body = parse(ChatRequest, await self._body(request))
        self._require_model(body.model)
        messages = [
            {**message.model_dump(exclude_none=True), "content": message.text} for message in body.messages
        ]
        try:
            prompt = self._template.render(messages=messages, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", "messages") from None
        require_text([prompt], "messages")
        return await self._answer(request, call, body, [prompt], Chat())

    async def _body(self, request: HttpRequest) -> bytes:
        data, most = bytearray(), self.settings.body_bytes
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                raise ApiError(413, f"the body is longer than {counted(most, 'byte')}")
        return bytes(data)

    # Texts.

    async def _answer(
        self,
        request: HttpRequest,
        call: Call,
        body: Generating,
        prompts: list[str],
        form: Form,
    ) -> Response:
        tokenizer, settings = self.batcher.loaded.tokenizer, self.settings
        if body.max_sentences and getattr(self.batcher.loaded.model.config, "ends", None) == "document":
            raise ApiError(400, "max_sentences: this model has tokens only", "max_sentences")
        default = 16 if isinstance(body, CompletionRequest) else min(512, settings.most_tokens)
        requests = body.requests(prompts, settings.most_tokens, default)
        if sum(map(len, prompts)) < SHORT_PROMPTS:
            encoded = tokenizer.encode_batch(prompts)
        else:
            encoded = await run_in_threadpool(tokenizer.encode_batch, prompts)
        lengths = [len(tokens) for tokens in encoded]
        require_short(max(lengths), settings.prompt_tokens)
        call.facts |= {"prompt_tokens": sum(lengths), "texts": len(requests)}
        texts = Texts(self.batcher, requests, call, self.metrics)
        head = {
            "id": f"{form.prefix}-{call.id}",
            "object": form.kind,
            "created": int(time.time()),
            "model": body.model,
        }
        try:
            if body.stream:
                first = await texts.next()  # refuses a bad prompt with a status of its own
                events = self._stream(body, head, form, texts, first, sum(lengths))
                return Stream(events, call, self)
            done = await _unless_gone(request, texts.all())
        except BaseException:
            texts.cancel()
            raise
        choices = [form.choice(number, requests[number], *done[number]) for number in range(len(requests))]
        call.facts["completion_tokens"] = sum(new_tokens(text) for _, text in done)
        return JSONResponse(
            {**head, "choices": choices, "usage": usage(sum(lengths), call.facts["completion_tokens"])}
        )

    async def _stream(
        self,
        body: Generating,
        head: dict[str, Any],
        form: Form,
        texts: Texts,
        events: list[tuple[int, list[Any]]],
        prompt_tokens: int,
    ) -> AsyncIterator[bytes]:
        head = {**head, "object": form.chunk_kind}
        more = {"usage": None} if body.with_usage else {}
        written = 0
        try:
            while True:
                data = b""  # one write for all that is due
                for number, found in events:
                    for choice in form.chunks(number, texts.requests[number], found):
                        data += _sse({**head, "choices": [choice], **more})
                    # Of its pieces the last alone may have no token.
                    written += len(found)
                    written -= sum(getattr(event, "token", None) is None for event in found[-2:])
                if not texts.left:
                    break
                yield data
                events = await texts.next()
            if body.with_usage:
                data += _sse({**head, "choices": [], "usage": usage(prompt_tokens, written)})
            yield data + b"data: [DONE]\n\n"
        except Exception as error:
            texts.call.facts["error"] = first_line(error)
            yield _sse(_as_api_error(error).body)
        finally:
            texts.call.facts["completion_tokens"] = written
            texts.cancel()


class Stream(StreamingResponse):
    """Server-sent events. A reader that stalls is dropped after the deadline; its rows are free by then."""

    def __init__(self, events: AsyncIterator[bytes], call: Call, server: Server) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events, self._call, self._server = events, call, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 200
        try:
            with anyio.fail_after(self._call.left() + STALLED):
                await super().__call__(scope, receive, send)
        except (TimeoutError, ClientDisconnect, OSError):
            status = 499
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
            self._server.finished(self._call, status)


async def _unless_gone(request: HttpRequest, work: Any) -> Any:
    """The result of `work`; stops it when the client's connection is cut."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


def _compiled(template: str | None) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return None if template is None else environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"the chat template is not valid Jinja: {error}") from None


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        later = {"retry-after": str(RETRY_AFTER)}
        return ApiError(429, "all rows and the queue are full: try again later", headers=later)
    if isinstance(error, Closing):
        return ApiError(503, "the server is shutting down")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than the server's deadline")
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client closed the connection")
    if isinstance(error, UserError):
        return ApiError(400, str(error), "prompt")
    log(f"internal error: {first_line(error)}")
    return ApiError(500, f"internal error: {type(error).__name__}")


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body, error.status_code, error.headers)


def _file(name: str, media_type: str) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def send(_: HttpRequest) -> Response:
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
        return Response((PAGE / name).read_bytes(), media_type=media_type, headers=headers)

    return send


def _sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
