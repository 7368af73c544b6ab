"""lm-evaluation-harness on model folders: scores beside `sllm evaluate` and the harness's own model."""

from __future__ import annotations

import configparser
import json
import math
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folders import STACK, save, small_model, write_jsonl
from helpers.paths import REPOSITORY
from helpers.tokenizer_folders import CHINESE, ENGLISH, LINES, byte_level, sentence_piece
from packaging.version import Version

from data_prep.common.errors import UserError
from data_prep.text.tokenizer import load_tokenizer
from pipeline.cli import console
from pipeline.cli.main import main
from pipeline.evaluation.evaluate import evaluate
from pipeline.generation.api import generate_many
from pipeline.generation.results import Limits
from pipeline.interop import local_tasks
from pipeline.models.factory import load_model

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from pipeline.interop.harness import TASKS  # noqa: E402
from pipeline.interop.lm_eval_model import FolderLM  # noqa: E402

GROUP = 'lm_eval.models"'  # of entry points

TEXTS = [ENGLISH.strip(), CHINESE.strip(), "A word", (ENGLISH + CHINESE) * 3, "One. Two.\nThree, four"]
PAIRS = [
    ("It was a bright cold day", " in April, and the clocks were striking thirteen."),
    ("The second paragraph speaks of numbers.", " It ends here…"),
    ("It was a bright cold ", "day in April"),
    ("Line one.\n", "Line two."),
    ("", "It was a bright cold day."),
    ("“Well,” said the engineer", ", “how many"),
]
FOLDERS = ("sllm-bpe", "sllm-pieces", "lm-bpe", "lm-pieces", "stack-pieces", "rule-bpe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tokenizers = {"bpe": byte_level(root / "bpe-tokenizer"), "pieces": sentence_piece(root / "sp-tokenizer")}
    for name, tokenizer in tokenizers.items():
        for kind in ("sllm", "lm", "vae"):
            save(small_model(kind, load_tokenizer(tokenizer)), root / f"{kind}-{name}", tokenizer)
    for name, stack in (("stack-pieces", STACK), ("rule-bpe", {**STACK, "ends": "rule"})):
        tokenizer = tokenizers[name.split("-")[1]]
        save(small_model("sllm", load_tokenizer(tokenizer), stack=stack), root / name, tokenizer)
    return {path.name: path for path in root.iterdir()}


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, n) for n, one in enumerate(arguments)]


def scored(lm: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def rolled(lm: Any, *texts: str) -> list[float]:
    return lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )


def written(lm: Any, *contexts: tuple[str, dict]) -> list[str]:
    return lm.generate_until(requests("generate_until", *contexts), disable_tqdm=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_rolling_is_evaluate(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    for window in (None, 70):
        found = rolled(FolderLM(str(folders[name]), window_tokens=window, batch_tokens=300), *TEXTS)
        expected = evaluate(folders[name], text=path, window_tokens=window)
        assert expected["documents"] == len(TEXTS) and (window is None or expected["windows"] > len(TEXTS))
        assert -sum(found) == pytest.approx(expected["nll_nats"], rel=1e-4)


@pytest.mark.parametrize("name", ["lm-bpe", "lm-pieces"])
def test_a_token_model_scores_as_the_harness_does(folders: dict[str, Path], name: str) -> None:
    ours = FolderLM(str(folders[name]))
    theirs = HFLM(str(folders[name]), device="cpu", batch_size=3)
    for mine, other in zip(scored(ours, *PAIRS), scored(theirs, *PAIRS), strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-4) and mine[1] == other[1]
    contexts = [(text, {"until": ["e"], "max_gen_toks": 5}) for text, _ in PAIRS if text]
    assert written(ours, *contexts) == written(theirs, *contexts)
    # Theirs leaves the end of the document out, and would score a start symbol of the tokenizer's.
    theirs = HFLM(str(folders[name]), device="cpu", add_bos_token=False)
    model: Any = theirs.model
    start, end = theirs.tokenizer.bos_token_id, theirs.tokenizer.eos_token_id
    for text, mine, other in zip(
        TEXTS[:3], rolled(ours, *TEXTS[:3]), rolled(theirs, *TEXTS[:3]), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([[start, *theirs.tok_encode(text)]])).logits[0, -1]
        assert mine == pytest.approx(other + logits.log_softmax(-1)[end].item(), rel=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("text", [ENGLISH.strip(), CHINESE.strip(), "A  b\n\nC é\U0001f468\u200d\U0001f469."])
def test_a_context_may_end_anywhere(folders: dict[str, Path], name: str, text: str, tmp_path: Path) -> None:
    lm = FolderLM(str(folders[name]))
    values = [v for v, _ in scored(lm, *((text[:at], text[at:]) for at in range(len(text) + 1)))]
    assert all(map(math.isfinite, values)) and values[-1] == 0
    # A longer context leaves less to be scored.
    assert all(a <= b + 1e-4 for a, b in zip(values, values[1:], strict=False))
    expected = evaluate(folders[name], text=write_jsonl(tmp_path / "text.jsonl", [text]))
    whole = expected["token_nll_nats"] + (
        expected["end_nll_nats"] if name.startswith(("sllm", "stack")) else 0
    )
    assert -values[0] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("name", ["sllm-bpe", "sllm-pieces", "stack-pieces"])
def test_sentences_add_up(folders: dict[str, Path], name: str) -> None:
    sentences = ["It was a bright cold day.", " The clocks were striking thirteen.", " It ends here."]
    lm, text = FolderLM(str(folders[name])), "".join(sentences)
    parts = [("".join(sentences[:n]), sentence) for n, sentence in enumerate(sentences)]
    assert sum(v for v, _ in scored(lm, *parts)) == pytest.approx(scored(lm, ("", text))[0][0], rel=1e-5)
    # An unfinished sentence has no end to score.
    with_end, without = scored(lm, ("It was", " cold."), ("It was", " cold"))
    model: Any = load_model(folders[name])
    tokenizer = load_tokenizer(folders[name] / "tokenizer")
    decoder = model.decode_begin(model.begin())
    nats = 0.0
    for token in tokenizer.encode("It was cold").tolist():
        nats += decoder.logits.log_softmax(-1)[token].item() * (token not in tokenizer.encode("It was"))
        model.decode_step(decoder, token)
    assert without[0] == pytest.approx(nats, rel=1e-4) and with_end[0] < without[0]


def test_a_long_context_loses_its_first_sentences(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lm = FolderLM(str(folders["sllm-bpe"]), window_tokens=80)
    context = ENGLISH.strip() + " "
    ((long, _),) = scored(lm, (context * 6, "It was cold."))
    assert "1 context lost its first sentences: 80 tokens are the most" in capsys.readouterr().err
    ((all_of_it, _),) = scored(lm, ("", ENGLISH * 4))
    assert math.isfinite(long) and all_of_it < 4 * long
    (text,) = written(lm, (context * 6, {"until": [], "max_gen_toks": 10}))
    assert text and "1 context lost" in capsys.readouterr().err


def test_texts_are_those_of_sllm_generate(folders: dict[str, Path]) -> None:
    folder = folders["sllm-bpe"]
    lm, model = FolderLM(str(folder), batch_size=3), load_model(folder)
    contexts = [context for context, _ in PAIRS]
    settings = [{"until": ["a"], "max_gen_toks": 8}, {"until": ["\n\n"], "max_gen_toks": 20}]
    found = written(lm, *((context, settings[n % 2]) for n, context in enumerate(contexts)))
    for n, text in enumerate(found):
        limits = Limits(1 << 20, settings[n % 2]["max_gen_toks"], tuple(settings[n % 2]["until"]))
        ((expected,),) = generate_many(model, lm._loaded.tokenizer, [contexts[n]], limits=limits)  # type: ignore[arg-type]
        assert text == expected.text
    with pytest.raises(UserError, match="--gen_kwargs num_beams: unknown"):
        written(lm, ("A", {"num_beams": 2}))


def test_local_tasks_are_made_from_documents(tmp_path: Path) -> None:
    documents = [
        f"The {w} is here. A {w} stands still. Many see the {w}. Most like the {w}. Then all go to the {w}."
        for w in ("house", "tower", "river", "garden", "street")
    ]
    text = write_jsonl(tmp_path / "documents.jsonl", documents)
    cloze = local_tasks.cloze(text)["test"]
    assert {(row["context"][-6:], row["answer"]) for row in cloze} >= {("to the", " house")}
    for row in local_tasks.next_sentence(text)["test"]:
        (document,) = (d for d in documents if row["context"] in d)
        assert len(row["choices"]) == 4 and f"{row['context']} {row['choices'][row['label']]}" in document
    for row in local_tasks.sentence_order(text)["test"]:
        assert any(f"{row['context']} {row['choices'][row['label']]}" in document for document in documents)
    assert local_tasks.cloze(text)["test"].to_list() == cloze.to_list()
    with pytest.raises(UserError, match="too few or too short"):
        local_tasks.cloze(write_jsonl(tmp_path / "short.jsonl", ["Too short."]))


@pytest.mark.long  # the harness reads all of its tasks first
def test_the_harness_command(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [" ".join(f"{line} I saw the {w}. We know the {w}." for line in LINES[:6]) for w in "abcdef"]
    text = write_jsonl(tmp_path / "documents.jsonl", [d.replace("the a", "the atlas") for d in documents])
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rolling.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {text}\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n"
        "doc_to_target: '{{content}}'\nmetric_list:\n- metric: bits_per_byte\n"
    )
    out = tmp_path / "out.json"
    words = ["--tasks", "sllm_next_sentence,sllm_sentence_order,mine", "--metadata", f"text={text}"]
    words += ["--include_path", str(tasks), "--limit", "4", "--output_path", str(out)]
    assert main(["lm-eval", "--model", str(folders["sllm-bpe"]), *words]) == 0
    (written,) = tmp_path.glob("out*.json")
    results = json.loads(written.read_text())["results"]
    assert 0 <= results["sllm_next_sentence"]["acc,none"] <= 1
    expected = evaluate(folders["sllm-bpe"], text=text, max_documents=4)
    assert results["mine"]["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], rel=1e-4)
    assert "sllm_next_sentence" in capsys.readouterr().out
    with pytest.raises(UserError, match="--model_args colour: unknown"):
        main(["lm-eval", "--model", str(folders["sllm-bpe"]), *words, "--model_args", "colour=red"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "vae-bpe", "--tasks", "sllm_cloze"], "a SentenceVAE rebuilds sentences"),
        (["--model", "missing", "--tasks", "sllm_cloze"], "model folder missing does not exist"),
        (["--model", "sllm-bpe"], "--tasks is missing"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    folders: dict[str, Path],
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [str(folders.get(word, word)) for word in words]
    monkeypatch.setattr("sys.argv", ["sllm", "lm-eval", *words])
    assert console() == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sllm: error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_the_plain_command_finds_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    name, target = config["options.entry_points"]["lm_eval.models"].strip().split(" = ")
    assert name == "sllm" and EntryPoint(name, target, "lm_eval.models").load() is FolderLM
    read = {path.name for path in Path(lm_eval.__file__).parent.glob("**/*.py") if GROUP in path.read_text()}
    if not read:
        # No release up to this one reads entry points: `lm_eval --model sllm` knows its own models only.
        assert Version(lm_eval.__version__) <= Version("0.4.13")
        return
    command = [sys.executable, "-m", "lm_eval", "--model", "sllm", "--tasks", "sllm_next_sentence"]
    command += ["--model_args", f"pretrained={folders['sllm-bpe']}", "--limit", "2"]
    command += ["--include_path", str(TASKS), "--output_path", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    assert list(tmp_path.glob("out*.json"))
