"""What transformers documents for `generate` on every causal LM, on an SLLM and a Llama side by side."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from helpers.model_folders import STACK, save, small_model
from helpers.tokenizer_folders import ENGLISH, LINES, byte_level, sentence_piece
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from data_prep.common.errors import UserError
from data_prep.text.hugging_face import write_hugging_face
from data_prep.text.tokenizer import load_tokenizer
from pipeline import SLLM
from pipeline.evaluation.evaluate import evaluate
from pipeline.generation.results import DOCUMENT_END, Continuation, Limits, Piece, Request, TextStream
from pipeline.generation.sampling import Sampling
from pipeline.generation.writer import BatchWriter
from pipeline.interop import SLLMForCausalLM
from pipeline.models.factory import load_model

WORDS = [word for line in LINES[:40] for word in line.split()]
PROMPTS = ["It was a bright", "The second paragraph speaks of", "“Well,” said the engineer.", "N"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name; the SLLMs write both kinds of ids."""
    root = tmp_path_factory.mktemp("models")
    tokenizers = {"bpe": byte_level(root / "bpe-tokenizer"), "pieces": sentence_piece(root / "sp-tokenizer")}
    for name, tokenizer in tokenizers.items():
        sllm: Any = small_model("sllm", load_tokenizer(tokenizer), noise=0.4, max_tokens=12)
        sllm.stop_head.bias.data.fill_(0.5)  # documents end early and late
        sllm.stop_head.weight.data.mul_(0.2)
        save(sllm, root / f"sllm-{name}", tokenizer)
        save(small_model("lm", load_tokenizer(tokenizer)), root / f"lm-{name}", tokenizer)
    for ends, tokenizer in zip(("predicted", "rule"), tokenizers.values(), strict=True):
        stack: Any = small_model(
            "sllm", load_tokenizer(tokenizer), noise=0.4, stack={**STACK, "ends": ends}, max_tokens=12
        )
        if ends == "predicted":
            stack.stop_head.bias.data.fill_(0.5)
            stack.stop_head.weight.data.mul_(0.2)
        else:
            end = stack.head.weight.data[load_tokenizer(tokenizer).eos_id]
            stack.final_norm.bias.data.add_(3.0 * end / end.dot(end))
        save(stack, root / f"stack-{ends}", tokenizer)
    exact = load_tokenizer(tokenizers["bpe"])
    torch.manual_seed(5)
    ids = {"bos_token_id": exact.bos_id, "eos_token_id": exact.eos_id, "pad_token_id": exact.pad_id}
    sizes = {"vocab_size": exact.vocab_size, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    write_hugging_face(exact, root / "llama")
    return {path.name: path for path in root.iterdir()}


class Loaded:
    def __init__(self, folder: Path):
        self.folder = folder
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(self, texts: str | list[str]) -> Any:
        return self.tokenizer(texts, return_tensors="pt", padding=True)

    def __call__(self, texts: str | list[str], **kwargs: Any) -> torch.Tensor:
        """New ids only."""
        given = self.ids(texts)
        out = self.model.generate(**given, **{"do_sample": False, **kwargs})
        assert torch.equal(
            out[:, : given["input_ids"].shape[1]],
            given["input_ids"].repeat_interleave(len(out) // len(given["input_ids"]), 0),
        )
        return out[:, given["input_ids"].shape[1] :]


@pytest.fixture(scope="module", params=["sllm-bpe", "sllm-pieces", "stack-predicted", "stack-rule", "llama"])
def lm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Loaded:
    return Loaded(folders[request.param])


@pytest.fixture(scope="module")
def sllm(folders: dict[str, Path]) -> Loaded:
    return Loaded(folders["sllm-bpe"])


def stripped(ids: torch.Tensor, lm: Loaded) -> list[int]:
    """Without padding."""
    return [i for i in ids.tolist() if i != lm.tokenizer.pad_token_id]


# --- every causal LM ------------------------------------------------------------------------------


def test_left_padding_changes_nothing(lm: Loaded) -> None:
    together = lm(PROMPTS, max_new_tokens=12)
    for prompt, ids in zip(PROMPTS, together, strict=True):
        assert stripped(ids, lm) == lm(prompt, max_new_tokens=12)[0].tolist()


def test_lengths(lm: Loaded) -> None:
    prompt = lm.ids(PROMPTS[0])["input_ids"].shape[1]
    assert lm(PROMPTS[0], max_new_tokens=7, eos_token_id=-1).shape[1] == 7
    assert lm(PROMPTS[0], max_length=prompt + 5, eos_token_id=-1).shape[1] == 5
    with pytest.raises(ValueError, match="max_length"):
        lm(PROMPTS[0], max_length=prompt)


def test_the_end_of_text_ends_and_is_padded(lm: Loaded) -> None:
    end, pad = lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id
    rows = lm(["N"] * 24, max_new_tokens=60, do_sample=True, top_k=0, temperature=2.0)
    ended = [row for row in rows.tolist() if end in row]
    assert ended or lm.folder.name == "llama"
    for row in ended:
        assert set(row[row.index(end) + 1 :]) <= {pad}
    shorter = lm(["N"] * 24, max_new_tokens=60, min_new_tokens=60, do_sample=True, temperature=2.0)
    assert shorter.shape == (24, 60) and not (shorter == end).any()


def test_any_id_can_be_an_end(lm: Loaded) -> None:
    free = lm(PROMPTS[0], max_new_tokens=8, eos_token_id=-1)[0].tolist()
    stop = free[3]
    assert (
        lm(PROMPTS[0], max_new_tokens=8, eos_token_id=[stop, 5])[0].tolist() == free[: free.index(stop) + 1]
    )


def test_forced_end(lm: Loaded) -> None:
    end = lm.tokenizer.eos_token_id
    assert end in lm(PROMPTS[0], max_new_tokens=6, forced_eos_token_id=end)[0].tolist()


def test_several_sequences(lm: Loaded) -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        lm(PROMPTS[0], num_return_sequences=3, max_new_tokens=2)
    rows = lm(PROMPTS[:2], num_return_sequences=3, do_sample=True, max_new_tokens=10)
    assert len(rows) == 6 and len({tuple(row) for row in rows.tolist()}) > 2


def test_a_seed_repeats_samples(lm: Loaded) -> None:
    rows = []
    for seed in (3, 3, 4):
        set_seed(seed)
        rows.append(lm(PROMPTS, do_sample=True, temperature=1.5, max_new_tokens=10).tolist())
    assert rows[0] == rows[1] != rows[2]


def test_sampling_settings(lm: Loaded) -> None:
    greedy = lm(PROMPTS[0], max_new_tokens=8)
    for only_one in ({"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-4}, {"min_p": 1.0}):
        assert torch.equal(lm(PROMPTS[0], max_new_tokens=8, do_sample=True, **only_one), greedy)


class Only(LogitsProcessor):
    """Allows a few ids; notes what it is given."""

    def __init__(self, allowed: list[int]):
        self.allowed, self.lengths = allowed, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked


def test_logits_processors(lm: Loaded) -> None:
    allowed = lm.tokenizer("abc", add_special_tokens=False)["input_ids"]
    only = Only(allowed)
    rows = lm(PROMPTS, max_new_tokens=6, logits_processor=LogitsProcessorList([only]), eos_token_id=-1)
    assert set(rows.flatten().tolist()) <= set(allowed) and rows.shape[1] == 6
    length = lm.ids(PROMPTS)["input_ids"].shape[1]
    assert {*range(length, length + 6)} == set(only.lengths)


def test_documented_processors(lm: Loaded) -> None:
    free = lm(PROMPTS[0], max_new_tokens=6, eos_token_id=-1)[0].tolist()
    banned = lm(PROMPTS[0], max_new_tokens=6, bad_words_ids=[[free[2]]], eos_token_id=-1)[0].tolist()
    assert free[2] not in banned
    suppressed = lm(PROMPTS[0], max_new_tokens=6, suppress_tokens=free, eos_token_id=-1)[0].tolist()
    assert not set(free) & set(suppressed)
    rows = lm(
        PROMPTS,
        max_new_tokens=4,
        prefix_allowed_tokens_fn=lambda row, ids: [10 + row],
        eos_token_id=-1,
    )
    assert rows.tolist() == [[10 + row] * 4 for row in range(len(PROMPTS))]
    twice = lm(PROMPTS[0], max_new_tokens=40, no_repeat_ngram_size=1, eos_token_id=-1)[0].tolist()
    assert len(set(twice)) == len(twice)


@pytest.mark.parametrize("shifted", [lambda x: x.log_softmax(-1), lambda x: x + 7])
def test_processors_that_move_all_scores_change_nothing(lm: Loaded, shifted: Any) -> None:
    class Move(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return shifted(scores)

    kept = LogitsProcessorList([Move()])
    # Prompts whose last tokens are kept with and without a processor.
    for prompt in ("It was a bright cold day in April.", "It ends here."):
        for more in ({}, {"bad_words_ids": [[lm.tokenizer.eos_token_id]]}):
            free = lm(prompt, max_new_tokens=20, **more)
            assert torch.equal(lm(prompt, max_new_tokens=20, logits_processor=kept, **more), free)


class AfterThree(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 3)


def test_stopping_criteria(lm: Loaded) -> None:
    length = lm.ids(PROMPTS)["input_ids"].shape[1]
    criteria = StoppingCriteriaList([AfterThree(length)])
    assert lm(PROMPTS, max_new_tokens=9, stopping_criteria=criteria).shape[1] == 3
    free = lm(PROMPTS[0], max_new_tokens=12, eos_token_id=-1)[0]
    stop = lm.tokenizer.decode(free[5])
    cut = lm(PROMPTS[0], max_new_tokens=12, stop_strings=[stop], tokenizer=lm.tokenizer, eos_token_id=-1)[0]
    assert stop in lm.tokenizer.decode(cut) and cut.tolist() == free[: len(cut)].tolist()


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamers(lm: Loaded) -> None:
    kept = Kept()
    new = lm(PROMPTS[0], max_new_tokens=6, streamer=kept)[0].tolist()
    prompt, *parts = kept.parts
    assert prompt == lm.ids(PROMPTS[0])["input_ids"][0].tolist()
    assert parts == [[i] for i in new] and kept.ended == 1
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = Thread(
        target=lm, args=(PROMPTS[0],), daemon=True, kwargs={"max_new_tokens": 6, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == lm.tokenizer.decode(new, skip_special_tokens=True)
    with pytest.raises(ValueError, match="batch size"):
        lm(PROMPTS, max_new_tokens=2, streamer=TextIteratorStreamer(lm.tokenizer))


def test_generation_config(lm: Loaded, tmp_path: Path) -> None:
    short = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=1)
    given = lm.ids(PROMPTS[0])
    out = lm.model.generate(**given, generation_config=short, return_dict_in_generate=True)
    assert out.sequences.shape[1] == given["input_ids"].shape[1] + 4
    lm.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "max_new_tokens": 3}))
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = again.generate(**given, eos_token_id=-1)
    assert out.shape[1] == given["input_ids"].shape[1] + 3


def test_the_text_generation_pipeline(lm: Loaded) -> None:
    write = pipeline("text-generation", model=str(lm.folder))
    for options in ({}, {"return_full_text": False}, {"num_return_sequences": 2, "do_sample": True}):
        options = {"do_sample": False, "max_new_tokens": 6, **options}
        for prompt, found in zip(PROMPTS[:2], write(PROMPTS[:2], batch_size=2, **options), strict=True):
            for one in found:
                full = options.get("return_full_text", True)
                assert one["generated_text"].startswith(prompt if full else "")
                if not options["do_sample"]:
                    new = lm.tokenizer.decode(lm(prompt, max_new_tokens=6)[0], skip_special_tokens=True)
                    assert one["generated_text"] == (prompt if full else "") + new


# --- an SLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sllm-bpe", "sllm-pieces", "lm-bpe", "lm-pieces"])
def test_auto_tokenizer_gives_our_ids(folders: dict[str, Path], name: str) -> None:
    exact, found = load_tokenizer(folders[name] / "tokenizer"), AutoTokenizer.from_pretrained(folders[name])
    for text in [*LINES[:5], "", " a\u2581b  </s><s><0x41>\n\n\t", "\U0001f468\u200d\U0001f469 é \0"]:
        ids = found(text)["input_ids"]
        assert ids == [exact.bos_id, *exact.encode(text).tolist()]
        assert found.decode(ids, skip_special_tokens=True) == text
    assert (found.eos_token_id, found.pad_token_id) == (exact.eos_id, exact.pad_id)


def test_any_user_may_read_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = tmp_path / "file"
    expected.touch()
    Loaded(folders["sllm-bpe"]).model.save_pretrained(tmp_path / "again")
    files = [path for name in ("sllm-bpe", "lm-bpe") for path in folders[name].rglob("*")]
    for path in [*files, *(tmp_path / "again").iterdir()]:
        assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(expected.stat().st_mode)


def prompts(count: int) -> list[str]:
    """Ends inside words, between them, and at ends of sentences."""
    return [
        " ".join(WORDS[n : n + 2 + n % 7])[: None if n % 3 else -1] + " " * (n % 5 == 0) for n in range(count)
    ]


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}


def expected_texts(
    lm: Loaded, texts: list[str], limit: int, sampling: Sampling
) -> list[tuple[list[str], str]]:
    """What `sllm generate` writes: the text after each of its tokens, and why it stops."""
    exact = load_tokenizer(lm.folder / "tokenizer")
    requests = (Request(n, text, 11 + n) for n, text in enumerate(texts))
    after: list[list[str]] = [[""] for _ in texts]
    stopped = [""] * len(texts)
    for number, event in BatchWriter(lm.model, exact, sampling, Limits(1 << 30, limit), 50).run(requests):
        if isinstance(event, Piece):
            after[number].append(after[number][-1] + event.text)
        elif isinstance(event, Continuation):
            stopped[number] = event.stopped
            assert event.text == after[number][-1]
    return list(zip(after, stopped, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "apart"),
    [
        ("sllm-bpe", {}, 29),
        ("sllm-pieces", SAMPLED, 29),
        *(
            pytest.param(name, options, 1, marks=pytest.mark.long)
            for name in ("sllm-bpe", "sllm-pieces", "stack-predicted", "stack-rule")
            for options in ({}, SAMPLED)
        ),
    ],
)
def test_the_ids_are_the_text_of_sllm_generate(
    folders: dict[str, Path], name: str, options: dict[str, Any], apart: int
) -> None:
    """200 prompts in batches, and every `apart`-th of them alone."""
    lm, texts = Loaded(folders[name]), prompts(200)
    if name == "stack-rule":
        end = lm.model.head.weight.data[lm.tokenizer.eos_token_id]
        lm.model.final_norm.bias.data.add_(7.0 * end / end.dot(end))
    else:
        lm.model.stop_head.bias.data.fill_(4.0)
    exact = load_tokenizer(lm.folder / "tokenizer")
    sampling = Sampling(0.7, 0.9, 20) if options else Sampling()

    def new_ids(first: int, count: int, limit: int) -> list[list[int]]:
        seed = {"seed": 11 + first} if options else {}
        found = lm(texts[first : first + count], max_new_tokens=limit, **options, **seed)
        return [stripped(row, lm) for row in found]

    # No limit: all documents end. Then a short one, which counts ids here and tokens there: where the
    # prompt's last token is replaced, its rest may take several ids.
    for limit in (200, 6):
        rows = [row for at in range(0, 200, 50) for row in new_ids(at, 50, limit)]
        for new, (after, stopped) in zip(rows, expected_texts(lm, texts, limit, sampling), strict=True):
            ended = new[-1:] == [exact.eos_id]
            text = TextStream(()).push(exact.decode_bytes(new[: len(new) - ended]), final=ended)
            if limit == 200 or ended:
                assert ended and stopped == DOCUMENT_END and text == after[-1]
            else:
                assert len(new) == limit and text in after
        for n in range(0, 200, apart):
            assert new_ids(n, 1, limit) == [rows[n]]


def test_text_in_text_out(sllm: Loaded) -> None:
    assert isinstance(sllm.model, SLLM) and isinstance(sllm.model, SLLMForCausalLM)
    model = load_model(sllm.folder)
    assert isinstance(model, SLLM)
    expected = model.generate("It was a", max_sentences=2)
    assert sllm.model.generate("It was a", max_sentences=2) == expected
    assert sllm.model.generate(prompt="It was a", max_sentences=2) == expected


@pytest.mark.parametrize(
    "option",
    [
        {"use_cache": False},
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"assistant_model": True},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.5, "top_k": 4},
        {"cache_implementation": "static"},
        {"guidance_scale": 2.0},
        {"return_dict_in_generate": True, "output_scores": True},
        {"inputs_embeds": torch.zeros(1, 2, 32)},
        {"past_key_values": ()},
        {"token_healing": True},
    ],
)
def test_what_cannot_be_meant_is_refused(sllm: Loaded, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no meaning for a sentence-level model") as refused:
        sllm.model.generate(**sllm.ids(PROMPTS[0]), max_new_tokens=2, **option)
    assert "\n" not in str(refused.value)


def test_ids_that_are_no_text_are_refused(sllm: Loaded) -> None:
    end = sllm.tokenizer.eos_token_id
    for ids, message in (
        ([[0, 300, end, 301]], f"control symbol {end} at place 2, inside the text"),
        ([[0, 100_000]], "100000 is no id"),
    ):
        with pytest.raises(UserError, match=message):
            sllm.model.generate(torch.tensor(ids), max_new_tokens=2)
    half = sllm.tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    if len(sllm.tokenizer("é", add_special_tokens=False)["input_ids"]) > 1:
        with pytest.raises(UserError, match="inside a character"):
            sllm.model.generate(torch.tensor([half]), max_new_tokens=2)


@pytest.mark.parametrize("name", ["sllm-bpe", "stack-predicted", "stack-rule"])
def test_the_loss_of_a_text(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    sllm = Loaded(folders[name])
    text = ENGLISH.strip()
    (tmp_path / "text.jsonl").write_text(json.dumps({"id": "1", "content": text}) + "\n")
    expected = evaluate(sllm.folder, text=tmp_path / "text.jsonl")
    ids = torch.tensor([[*sllm.tokenizer(text)["input_ids"], sllm.tokenizer.eos_token_id]])
    with torch.no_grad():
        loss = sllm.model(input_ids=ids, labels=ids).loss
        assert loss.item() == pytest.approx(expected["nll_nats"] / expected["tokens"], rel=1e-5)
        padded = torch.cat([torch.ones_like(ids), ids], dim=1)
        mask = torch.cat([torch.zeros_like(ids), torch.ones_like(ids)], dim=1)
        assert sllm.model(padded, mask, padded).loss.item() == pytest.approx(loss.item(), rel=1e-6)
        # The parts of a text add up.
        half, counts = ids.shape[1] // 2, [0, 0]
        nats = 0.0
        for part in (slice(0, half), slice(half, None)):
            labels = torch.full_like(ids, -100)
            labels[:, part] = ids[:, part]
            counts = int((labels[0] != -100).sum()) - (part.start == 0) - (part.stop is None)
            nats += sllm.model(ids, labels=labels).loss.item() * counts
        assert nats == pytest.approx(expected["nll_nats"], rel=1e-5)
    with pytest.raises(UserError, match="gives a loss only"):
        sllm.model(input_ids=ids)
    sllm.model.train()
    sllm.model(input_ids=ids, labels=ids).loss.backward()
    assert sllm.model.get_input_embeddings().weight.grad.abs().sum() > 0
