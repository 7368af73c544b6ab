"""`sllm chat`: a conversation in the terminal."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.common.errors import UserError
from pipeline.cli.generate import Settings, require_text
from pipeline.generation.api import Generation
from pipeline.generation.results import Limits
from pipeline.generation.sampling import Sampling

HELP = """\
The model continues the text so far and what you type. An empty line adds nothing. Ctrl-C stops the model.
/new              start a new text
/set              show the settings
/set NAME VALUE   change one, for example /set temperature 0.7, /set top_p none
/help, /quit"""
_SETTABLE = {
    field.name: kind
    for kind, names in ((Sampling, None), (Limits, ("max_sentences", "max_tokens")))
    for field in dataclasses.fields(kind)
    if names is None or field.name in names
}
_WHOLE = ("top_k", "max_sentences", "max_tokens")


def converse(
    folder: str | Path, how: Settings, read: Callable[[], str], write: Callable[[str], None]
) -> Iterator[str]:
    """A conversation: the model continues the text so far and what is typed; `HELP` lists the commands.

    `read` gives a line and raises EOFError at the end; `write` shows text. Yields every continuation.
    """
    model, tokenizer = how.load(folder)
    text, turn = "", 0
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        word, *values = line.split()[:3] or [""]
        if word == "/quit":
            return
        if word == "/new":
            text = ""
        elif word == "/help":
            write(HELP + "\n")
        elif word == "/set":
            try:
                how = change(how, values)
            except UserError as error:
                write(f"[{error}]\n")
            else:
                write("".join(f"{name} {_value(how, name)}\n" for name in values[:1] or _SETTABLE))
        else:
            written, stopped = "", "stopped"
            try:
                require_text(line, "the line")
                seed = (how.seed or 0) + turn
                run = Generation(model, tokenizer, text + line, how.sampling, how.limits, seed)
                for piece in run.pieces():
                    written += piece.text
                    write(piece.text)
                stopped = str(run.stopped)
            except UserError as error:
                write(f"[{error}]\n")
                continue
            except KeyboardInterrupt:
                pass
            write(f"\n[{stopped}]\n")
            text, turn = text + line + written, turn + 1
            yield written


def change(how: Settings, values: list[str]) -> Settings:
    """Settings with `/set NAME VALUE`. Raises: UserError for another name, or a value that cannot be."""
    if not values:
        return how
    name = values[0].replace("-", "_")
    if name not in _SETTABLE:
        raise UserError(f"there is no setting {values[0]}: they are {', '.join(_SETTABLE)}")
    if len(values) < 2:
        return how
    try:
        value = None if values[1] == "none" else (int if name in _WHOLE else float)(values[1])
        part = "sampling" if _SETTABLE[name] is Sampling else "limits"
        return dataclasses.replace(how, **{part: dataclasses.replace(getattr(how, part), **{name: value})})
    except (TypeError, ValueError):
        raise UserError(f"{name} cannot be {values[1]}") from None


def _value(how: Settings, name: str) -> object:
    name = name.replace("-", "_")
    return getattr(how.sampling if _SETTABLE[name] is Sampling else how.limits, name)


def line_reader() -> Callable[[], str]:
    """What reads lines: prompt_toolkit on a terminal (history, several lines by Alt-Enter), else `input`."""
    if not sys.stdin.isatty() or importlib.util.find_spec("prompt_toolkit") is None:
        return lambda: input("> ")
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession("> ", key_bindings=keys)
    return session.prompt
