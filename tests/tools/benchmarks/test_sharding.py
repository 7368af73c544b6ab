"""The benchmark measures real commands: whole process trees, memory, ids and reading back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tokenizer_folders

from data_prep.common.errors import UserError
from tools.benchmarks import sharding as benchmark

pytestmark = pytest.mark.launch

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> benchmark.Bench:
    folder = tmp_path_factory.mktemp("benchmark")
    text = tokenizer_folders.ENGLISH * 20
    (folder / "EN").mkdir()
    lines = [json.dumps({"id": f"d{i}", "content": f"{i}. {text}"}) for i in range(30)]
    (folder / "EN" / "a.jsonl").write_text("\n".join(lines) + "\n{broken\n", encoding="utf-8")
    tokenizer = tokenizer_folders.byte_level(folder / "tokenizer")
    (folder / "work").mkdir()
    return benchmark.Bench(folder / "work", [str(folder / "EN")], str(tokenizer))


def test_cpu_of_the_whole_tree(tmp_path: Path):
    inner = tmp_path / "inner.py"
    inner.write_text(BURN.format(0.3), encoding="utf-8")
    outer = tmp_path / "outer.py"
    start = f"import subprocess, sys\nsubprocess.run([sys.executable, {str(inner)!r}], check=True)\n"
    outer.write_text(BURN.format(0.2) + start + "print('done')\n", encoding="utf-8")
    began = time.perf_counter()
    measured = benchmark.measure([sys.executable, str(outer)])
    assert measured.stdout == "done\n"
    assert measured.cpu >= 0.5
    assert 0.5 <= measured.wall <= time.perf_counter() - began


def test_memory_of_each_process(tmp_path: Path):
    inner = "x = bytearray(120_000_000); import time; time.sleep(0.5)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    ballast = bytearray(300_000_000)  # must not be taken for the command's
    measured = benchmark.measure([sys.executable, "-c", outer])
    assert len(ballast) and 120 < measured.worker_mb < 200
    assert measured.peak_mb == measured.worker_mb
    alone = benchmark.measure([sys.executable, "-c", "import time; time.sleep(0.2)"])
    assert alone.worker_mb == 0 and 1 < alone.peak_mb < 100


def test_a_command_that_fails():
    with pytest.raises(UserError, match="ended with status 3: the reason"):
        benchmark.measure(
            [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"]
        )


def test_speed_and_workers(bench: benchmark.Bench):
    result = benchmark.side_by_side(bench, 2, ["speed", "workers"], None)
    speed = result["speed"]
    assert speed["documents"] == 30 and "datatrove" not in speed
    rates, seconds = speed["shard"]["mb_per_cpu_second"], speed["shard"]["cpu_seconds"]
    assert len(rates["values"]) == len(seconds["values"]) == 2
    for rate, spent in zip(rates["values"], seconds["values"], strict=True):
        assert rate == pytest.approx(speed["mb_of_text"] / spent, rel=0.05)
    assert rates["least"] <= rates["median"] <= rates["most"]
    workers = result["workers"]
    ratio = workers["wall_1"]["median"] / workers["wall_2"]["median"]
    assert workers["times_faster"] == pytest.approx(ratio, rel=0.01)
    assert len(list(bench.folder.glob("shards-*"))) == 1  # only the last ones stay


def test_memory_of_a_small_and_a_large_input(bench: benchmark.Bench):
    result = benchmark.memory(bench, 0.2, 0.6)
    assert result["small"]["input_mb"] == pytest.approx(0.2, abs=0.01)
    assert result["big"]["input_mb"] == pytest.approx(0.6, abs=0.01)
    assert result["big"]["documents"] > 2 * result["small"]["documents"] > 60  # read more than once
    for one in result.values():
        assert 20 < one["largest_process_mb"] < 500
    assert not list(bench.folder.glob("input-*"))


def test_ids_of_every_document(bench: benchmark.Bench, monkeypatch: pytest.MonkeyPatch):
    result = benchmark.compare_ids(bench)
    assert result["documents"] == 30 and result["differences"] == 0 and result["first_different"] == []
    assert result["engine"].startswith("gigatoken") and result["reference"].startswith("tokenizers")
    # A tokenizer whose fast side is that of another one: every document differs.
    other = tokenizer_folders.byte_level(bench.folder.parent / "other", vocab_size=400)
    from data_prep.text import tokenizer as module

    engine, build = module.load_tokenizer(other)._fast, module.load_tokenizer

    def mixed(folder: str) -> module.Tokenizer:
        tokenizer = build(folder)
        tokenizer._fast = engine
        return tokenizer

    monkeypatch.setattr(benchmark, "load_tokenizer", mixed)
    result = benchmark.compare_ids(bench)
    assert result["differences"] == 30
    assert len(result["first_different"]) == 5 and result["first_different"][1].startswith("1. It was")


def test_reading_back(bench: benchmark.Bench):
    result = benchmark.reading(bench.shards(), 2)
    assert result["documents"] == 30
    assert len(result["mtokens_per_cpu_second"]["values"]) == 2
    for kind in ("by_number_us", "by_key_us"):
        assert 0 < result[kind]["median"] <= result[kind]["p99"] <= result[kind]["most"]


def test_the_result_file(bench: benchmark.Bench, tmp_path: Path):
    output = tmp_path / "figures.json"
    asked = {"input": bench.inputs, "tokenizer": bench.tokenizer, "only": ["ids", "reading"], "runs": 1}
    result = benchmark.run(**asked, output=str(output))
    assert json.loads(output.read_text(encoding="utf-8")) == result
    assert result["cores"] >= 1 and result["packages"]["numpy"] and "git_commit" in result
    assert set(result) >= {"date", "cpu", "memory_gb", "ids", "reading"} and "speed" not in result


def test_what_datatrove_cannot_read_is_said_first(bench: benchmark.Bench, tmp_path: Path):
    (tmp_path / "book.txt").write_text("A book.", encoding="utf-8")
    other = benchmark.Bench(tmp_path, [str(tmp_path / "book.txt")], bench.tokenizer)
    with pytest.raises(UserError, match="takes .jsonl and .jsonl.gz, not .*book.txt"):
        other.datatrove(sys.executable)
    pieces = benchmark.Bench(tmp_path, bench.inputs, str(tmp_path))
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        pieces.datatrove(sys.executable)


def test_the_datatrove_script_needs_nothing_of_ours():
    script = Path(benchmark.__file__).with_name("datatrove_run.py")
    code = f"import runpy; runpy.run_path({str(script)!r})"
    subprocess.run([sys.executable, "-S", "-I", "-c", code], check=True)


def test_bad_arguments():
    with pytest.raises(UserError, match="--big-mb"):
        benchmark.run(input=["x"], tokenizer="y", big_mb=1)
