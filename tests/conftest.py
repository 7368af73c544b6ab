"""Settings and fixtures for the whole suite.

Sets the environment before torch is imported (one thread, no network), skips `cuda` and `slurm` tests with a
reason where the machine lacks them, and makes one small corpus and one small shard set per session, by the
real commands.

`SLLM_REQUIRE=slurm` (also `cuda`, comma separated) turns those skips into failures, and any other skip too,
but for a missing GPU: CI sets it, so that a broken installation cannot pass as a skip.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")

import pytest  # noqa: E402
from helpers import (
    ranks,  # noqa: E402
    runs,  # noqa: E402
    slurm_cluster,  # noqa: E402
)
from helpers.data_prep_command import data_prep  # noqa: E402

REQUIRED = set(filter(None, os.environ.get("SLLM_REQUIRE", "").replace(",", " ").split()))


@functools.cache
def no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


WHY_NOT = {"cuda": no_cuda, "slurm": slurm_cluster.why_not}


def pytest_configure(config: pytest.Config) -> None:
    if unknown := REQUIRED - set(WHY_NOT):
        raise pytest.UsageError(f"SLLM_REQUIRE: unknown {sorted(unknown)}; known are {sorted(WHY_NOT)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()) or item.get_closest_marker("slurm"):
            item.add_marker("launch")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, why_not in WHY_NOT.items():
        if item.get_closest_marker(name) and (reason := why_not()):
            if name in REQUIRED:
                pytest.fail(f"{name} is required here (SLLM_REQUIRE) but: {reason}", pytrace=False)
            pytest.skip(f"{name}: {reason}")


# No GPU is expected anywhere, nor a library that only a compiler can install.
MAY_BE_SKIPPED = "Skipped: cuda:", "Skipped: llama.cpp:"
unexpected_skips: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not reason.startswith(MAY_BE_SKIPPED):
            unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        unexpected_skips.append(f"{report.nodeid}: {report.longrepr}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if REQUIRED and unexpected_skips and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REQUIRED and unexpected_skips:
        terminalreporter.section("skipped, but nothing may be skipped here (SLLM_REQUIRE)")
        for line in unexpected_skips:
            terminalreporter.line(line)


def read_documents(path: Path) -> list[dict]:
    """The documents of one WanJuan file (`.jsonl` or `.jsonl.gz`)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `train.jsonl` (about 300 kB) and `valid.jsonl` (about 40 kB) out of the demo corpus."""
    folder = tmp_path_factory.mktemp("tiny-corpus")
    data_prep("demo-corpus", "--output", folder / "all")
    documents = [d for path in sorted((folder / "all").rglob("*.jsonl*")) for d in read_documents(path)]
    # Every k-th document, so that all sources are present; very long ones would be most of the text.
    documents = [d for d in documents if len(d["content"]) <= 8000]
    budgets = {"train": 300_000, "valid": 40_000}
    total = sum(len(d["content"]) for d in documents)
    step = max(1, total // sum(budgets.values()))
    chosen = iter(documents[::step] + documents[1::step])
    for name, budget in budgets.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as out:
            while budget > 0:
                document = next(chosen)
                budget -= len(document["content"])
                out.write(json.dumps(document, ensure_ascii=False) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SentencePiece tokenizer with 512 entries, trained on the tiny corpus."""
    folder = tmp_path_factory.mktemp("tiny-tokenizer") / "sp512"
    data_prep("tokenizer", "--input", tiny_corpus / "train.jsonl", "--output", folder, "--vocab-size", "512")
    return folder


def make_shards(corpus: Path, tokenizer: Path, output: Path) -> Path:
    settings = ("--segmenter", "clause", "--lang", "en", "--workers", "1")
    data_prep("shard", "--input", corpus, "--output", output, "--tokenizer", tokenizer, *settings)
    return output


@pytest.fixture(scope="session")
def tiny_shards(tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training shard set: English, clause cut, about 300 kB of text."""
    return make_shards(tiny_corpus / "train.jsonl", tiny_tokenizer, tmp_path_factory.mktemp("tiny") / "train")


@pytest.fixture(scope="session")
def tiny_valid_shards(
    tiny_corpus: Path, tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a validation shard set with the same settings: other documents, about 40 kB of text."""
    return make_shards(tiny_corpus / "valid.jsonl", tiny_tokenizer, tmp_path_factory.mktemp("tiny") / "valid")


@pytest.fixture(scope="session")
def pool() -> Iterator[ranks.RankPool]:
    pool = ranks.RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def recipes(tiny_shards: Path, tiny_valid_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small recipes of `runs.write_recipes`."""
    folder = tmp_path_factory.mktemp("recipes")
    runs.write_recipes(folder, tiny_shards, tiny_valid_shards)
    return folder
