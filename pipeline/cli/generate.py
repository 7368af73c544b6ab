"""One prompt with live text, a file of prompts that can be resumed, or a conversation in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.common.errors import UserError, counted
from data_prep.common.files import write_atomically
from pipeline.generation.api import Generation, generate_many
from pipeline.generation.results import Continuation, Limits
from pipeline.generation.sampling import Sampling
from pipeline.models.inference import load_for_generation
from pipeline.parallel.device import DeviceName, DtypeName


@dataclass(frozen=True)
class Settings:
    """How to generate; bad values are refused (UserError) before a model is loaded."""

    sampling: Sampling
    limits: Limits
    samples: int
    best_of: bool
    seed: int | None
    int8: bool = False
    seed_drawn: bool = False  # the user gave no seed: a run that resumes takes the first run's
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    batch_invariant: bool = False

    def load(self, folder: str | Path) -> tuple[Any, Any]:
        """The model of a folder and its tokenizer."""
        return load_for_generation(folder, self.int8, self.device, self.dtype, self.batch_invariant)

    def to_dict(self) -> dict[str, Any]:
        limits = asdict(self.limits)
        del limits["sentence_tokens"]
        more: dict[str, Any] = {
            "samples": self.samples,
            "best_of": self.best_of,
            "seed": self.seed,
            "int8": self.int8,
        }
        # Only in outputs whose values depend on it: those of earlier releases are resumed.
        more |= {"dtype": self.dtype} if self.dtype != "auto" else {}
        return {**asdict(self.sampling), **limits, **more}


def settings(
    max_sentences: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    max_tokens: int | None = None,
    stop: Iterable[str] = (),
    samples: int = 1,
    best_of: int | None = None,
    seed: int | None = None,
    int8: bool = False,
) -> Settings:
    """Settings from options. Sampled unless the temperature is 0, because the greedy text of a small model
    soon repeats itself; sampling without a seed draws one."""
    temperature = 1.0 if temperature is None else temperature
    if temperature == 0 and max(samples, best_of or 1) > 1:
        raise UserError("several texts of one prompt are all the same at temperature 0: give a temperature")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UserError(f"seed {seed}: must be from 0 to {(1 << 63) - 1}")
    seed_drawn = seed is None and temperature > 0
    if seed_drawn:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
    return Settings(
        Sampling(temperature, top_p, top_k, min_p, repetition_penalty),
        Limits(max_sentences, max_tokens, tuple(stop)),
        best_of or samples,
        best_of is not None,
        seed,
        int8,
        seed_drawn,
    )


def record(text: Continuation) -> dict[str, Any]:
    """A finished text as plain JSON; log-probabilities in nats."""
    return {
        "text": text.text,
        "sentences": [sentence.text for sentence in text.sentences],
        "tokens": [list(sentence.tokens) for sentence in text.sentences],
        "sentence_log_probabilities": [round(s.log_probability, 5) for s in text.sentences],
        "stop_probabilities": [s.stop_probability and round(s.stop_probability, 6) for s in text.sentences],
        "log_probability": round(text.log_probability, 5),
        "stopped": text.stopped,
        "seed": text.seed,
    }


def generate_prompt(
    folder: str | Path, prompt: str, how: Settings, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Continue one prompt. `on_text` gets the prompt and each piece of a single text as it is generated; of
    several texts, all of them at the end.

    Returns: prompt, text (prompt and first continuation), its sentences, number of tokens and
    log-probabilities, stopped, samples (all texts, as from `record`), seconds (without loading), settings.
    """
    require_text(prompt, "the prompt")
    model, tokenizer = how.load(folder)
    on_text = on_text or (lambda piece: None)
    started = time.perf_counter()
    if how.samples == 1:
        run = Generation(model, tokenizer, prompt, how.sampling, how.limits, how.seed)
        on_text(prompt)
        for piece in run.pieces():
            on_text(piece.text)
        texts = [run.result]
    else:
        (found,) = _generate_many(model, tokenizer, [prompt], how, how.samples, how.seed)
        if isinstance(found, UserError):
            raise found
        texts = found
        on_text("\n\n".join(prompt + text.text for text in texts))
    first = record(texts[0])
    return {
        **how.to_dict(),
        "prompt": prompt,
        **first,
        "text": prompt + first["text"],
        "tokens": sum(map(len, first["tokens"])),
        "samples": [record(text) for text in texts],
        "seconds": round(time.perf_counter() - started, 4),
        "model": str(folder),
    }


def _generate_many(
    model: Any, tokenizer: Any, prompts: Iterable[str], how: Settings, batch_size: int, seed: int | None
) -> Iterator[list[Continuation] | UserError]:
    more = (how.sampling, how.limits, batch_size, how.samples, how.best_of, seed)
    return generate_many(model, tokenizer, prompts, *more)


def generate_file(
    folder: str | Path, prompts: str | Path, output: str | Path, how: Settings, batch_size: int
) -> dict[str, Any]:
    """Continue every prompt of a file, `batch_size` texts at a time.

    Args:
        prompts: JSON lines, each an object with `prompt` (text); its other fields are copied to the output.
        output: JSON lines in the prompts' order: the prompt's fields and `samples`, or `error` where a prompt
            cannot be continued. Complete lines of an earlier run stay. `OUTPUT.settings.json` records how
            it was made.
    Returns: counts of prompts, resumed lines, errors (resumed ones included) and new tokens; seconds.
    Raises: UserError for a bad line, and for an output started with other settings or prompts.
    """
    lines, output = read_prompts(prompts), Path(output)
    how, done = resume(output, lines, how, str(folder))
    with open(output, "r+b" if output.exists() else "wb") as out:
        out.truncate(done.bytes)
        out.seek(done.bytes)
        counts = {"prompts": len(lines), "resumed": done.lines, "errors": done.errors, "tokens": 0}
        started = time.perf_counter()
        if done.lines < len(lines):
            model, tokenizer = how.load(folder)
            started = time.perf_counter()
            todo = lines[done.lines :]
            first_seed = (how.seed or 0) + done.lines * how.samples
            prompts_todo = (line["prompt"] for line in todo)
            many = _generate_many(model, tokenizer, prompts_todo, how, batch_size, first_seed)
            for line, texts in zip(todo, many, strict=True):
                if isinstance(texts, UserError):
                    counts["errors"] += 1
                    line = {**line, "error": str(texts)}
                else:
                    samples = [record(text) for text in texts]
                    counts["tokens"] += sum(len(s) for sample in samples for s in sample["tokens"])
                    line = {**line, "samples": samples}
                out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                out.flush()
    return {**counts, "seconds": round(time.perf_counter() - started, 4), "output": str(output)}


def format_counts(result: dict[str, Any]) -> str:
    """The result of `generate_file` as one line."""
    return (
        f"{counted(result['prompts'], 'prompt')} ({result['resumed']} there before), "
        f"{result['errors']} refused, "
        f"{counted(result['tokens'], 'new token')} in {result['seconds']:.2f} s: {result['output']}"
    )


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of prompts. Raises: UserError that names the first bad line."""
    lines = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise UserError(f'{path} line {number}: must be an object such as {{"prompt": "The list"}}')
        require_text(value["prompt"], f"{path} line {number}: the prompt")
        lines.append(value)
    if not lines:
        raise UserError(f"{path}: holds no prompt")
    return lines


class Done(NamedTuple):
    """What an output holds: complete lines, their bytes, and how many of them are errors."""

    lines: int = 0
    bytes: int = 0
    errors: int = 0


def resume(output: Path, prompts: list[dict[str, Any]], how: Settings, folder: str) -> tuple[Settings, Done]:
    """The settings to resume with (an earlier run's drawn seed is kept), and what the output holds. Writes
    the settings file of a new output.

    Raises: UserError when the output was made with other settings or prompts.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file")
    sidecar = output.with_name(output.name + ".settings.json")
    wanted = json.loads(json.dumps({**how.to_dict(), "model": folder}))  # as read from a file
    if not sidecar.exists():
        if output.exists() and output.stat().st_size:
            raise UserError(f"{output}: exists, and was not started by this command; name another output")
        write_atomically(sidecar, (json.dumps(wanted, indent=1) + "\n").encode())
        return how, Done()
    before = _object(sidecar.read_bytes(), str(sidecar))
    for key, value in wanted.items():
        if before.get(key) != value and not (key == "seed" and how.seed_drawn):
            raise UserError(
                f"{output}: was started with {key} {before.get(key)!r}, not {value!r}; name another output"
            )
    how = replace(how, seed=before.get("seed"))
    data = output.read_bytes() if output.exists() else b""
    complete = data[: data.rfind(b"\n") + 1]
    lines = [_object(x, f"{output} line {n}") for n, x in enumerate(complete.splitlines(), 1)]
    for number, line in enumerate(lines):
        if number >= len(prompts) or line.get("prompt") != prompts[number]["prompt"]:
            raise UserError(f"{output} line {number + 1}: is of another prompt; name another output")
    return how, Done(len(lines), len(complete), sum("samples" not in line for line in lines))


def _object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object that this command wrote. Raises: UserError when it is something else now."""
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: was changed by something else; name another output")
    return value


def require_text(text: str, what: str) -> None:
    """Raises: UserError for lone surrogates, which are what invalid UTF-8 on a command line becomes."""
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise UserError(f"{what} is not valid UTF-8 text: give it in UTF-8")


def show(text: str) -> None:
    """Text on the terminal, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
