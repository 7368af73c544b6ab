"""`data-prep shard` as a whole: the same bytes however the work is divided, stopped and restarted."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers import tokenizer_folders
from helpers.corpus_lines import bad_line, good_line
from helpers.data_prep_command import COMMAND, call, contents, refused
from helpers.mpi import MPIRUN, mpi_environment
from helpers.paths import REPOSITORY

from data_prep.corpus import documents, duplicates
from data_prep.jobs import run, units
from data_prep.shards.reader import ShardSet
from data_prep.shards.split import parse_parts, split
from data_prep.shards.verify import verify, verify_deep
from data_prep.text.tokenizer import ByteLevelTokenizer, load_tokenizer

pytestmark = pytest.mark.launch


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of unequal size, plain and gzip, English and Chinese; bad lines, missing ids, equal texts."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    for number in range(6):
        chinese = number % 3 == 2
        text = tokenizer_folders.CHINESE if chinese else tokenizer_folders.ENGLISH
        lines = [
            # Every seventh text is in all files of its language, and twice in its own.
            json.dumps(
                {
                    "id": f"{number}-{n}",
                    "content": (f"{n}. " if n % 7 else f"{n // 14}, ") + text * (1 + n % 4),
                }
            )
            for n in range(20 * (number + 1))
        ]
        for n in range(3, len(lines), 31):
            lines[n] = lines[n][:20]
        lines[5] = '{"content": "No id."}'
        ending = ".jsonl.gz" if number % 2 else ".jsonl"
        write_lines(folder / ("CN/news" if chinese else "EN/books") / f"part-{number:06d}{ending}", lines)
    return folder


def arguments_for(corpus: Path, output: Path, tokenizer: Path, *more: str | Path) -> list[str]:
    basic = ["shard", "--input", corpus, "--output", output, "--tokenizer", tokenizer]
    # Units so small that plain files are cut into pieces.
    return list(map(str, [*basic, "--shard-documents", "25", "--unit-mb", "0.02", *more]))


@pytest.fixture(scope="module")
def shards(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "shards"
    assert call(*arguments_for(corpus, output, tokenizer, "--workers", "1")) == 0
    return output


# The same bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_no_byte(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path, workers: int
):
    assert call(*arguments_for(corpus, tmp_path / "s", tokenizer, "--workers", str(workers))) == 0
    assert contents(tmp_path / "s") == contents(shards)


def test_pieces_are_the_whole(corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path):
    """Cut into pieces or not, the documents are the same, and so are files and lines in the quarantine."""
    arguments = arguments_for(corpus, tmp_path / "s", tokenizer, "--unit-mb", "100")
    assert call(*arguments) == 0
    cut, whole = ShardSet.open(shards), ShardSet.open(tmp_path / "s")
    assert max(len(entry["pieces"]) for entry in cut.manifest["inputs"]) > 1
    assert {len(entry["pieces"]) for entry in whole.manifest["inputs"]} == {1}
    assert (shards / "quarantine.jsonl").read_bytes() == (tmp_path / "s/quarantine.jsonl").read_bytes()
    for one, other in zip(cut.documents(), whole.documents(), strict=True):
        assert (one.id, one.source, one.text_hash) == (other.id, other.source, other.text_hash)
    for key in ("totals", "languages", "sources", "rejected", "repaired"):
        assert cut.manifest[key] == whole.manifest[key]


def test_rejected_lines_are_named(corpus: Path, shards: Path):
    told = {
        (entry["file"], entry["line"])
        for entry in map(json.loads, (shards / "quarantine.jsonl").read_text().splitlines())
        if entry["reason"] == "invalid JSON"
    }
    expected = set()
    for path in corpus.rglob("*.jsonl*"):
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
        expected |= {
            (f"{path.parent.name}/{path.name}", n)
            for n, line in enumerate(lines, start=1)
            if not line.endswith("}")
        }
    assert told == expected
    assert len(told) > 10


def run_by_mpi(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command, environment = [*MPIRUN, *COMMAND, *arguments], mpi_environment(folder)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_a_real_mpirun_gives_the_same_bytes(corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path):
    arguments = arguments_for(corpus, tmp_path / "s", tokenizer)
    done = run_by_mpi(tmp_path, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["already_there"] is False  # said once, by one rank
    assert contents(tmp_path / "s") == contents(shards)
    again = run_by_mpi(tmp_path, *arguments)
    assert again.returncode == 0 and again.stdout.count("already there") == 1
    arguments[arguments.index("--tokenizer") + 1] = str(tmp_path / "nowhere")
    bad = run_by_mpi(tmp_path, *arguments)
    assert bad.returncode == 2
    assert bad.stderr.count("data-prep: error: tokenizer folder") == 1
    assert "Traceback" not in bad.stderr


@pytest.mark.parametrize("more", [(), ("--deduplicate",)])
def test_tasks_of_an_array_do_their_shares_and_one_merges(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path, more: tuple[str, ...]
):
    def task(number: int, tasks: int = 3) -> subprocess.Popen:
        array = {"ID": 4 + 2 * number, "MIN": 4, "MAX": 2 + 2 * tasks, "STEP": 2, "COUNT": tasks}
        environment = os.environ | {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in array.items()}
        command = [*COMMAND, *arguments_for(corpus, tmp_path / "s", tokenizer, "--json", *more)]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=-1, stderr=-1, text=True)

    def run_round(numbers: range) -> list[int]:
        running = [task(number) for number in numbers]
        said = [process.communicate(timeout=120) for process in running]
        for process, (out, err) in zip(running, said, strict=True):
            assert (process.returncode == 0) == bool(out), err
            assert ("units of other tasks are missing" in err) == (process.returncode == 75), err
        return [process.returncode for process in running]

    assert run_round(range(2)) == [75, 75]
    # The last task completes the phase. After the hashes, the other tasks' shards are still missing.
    assert run_round(range(2, 3)) == ([75] if more else [0])
    if more:
        assert 0 in run_round(range(3))
    assert run_round(range(3)) == [0, 0, 0]
    whole = shards
    if more:
        whole = tmp_path / "whole"
        assert call(*arguments_for(corpus, whole, tokenizer, *more)) == 0
    assert contents(tmp_path / "s") == contents(whole)


def test_an_array_that_is_no_range_is_refused(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    for key, value in {"ID": 3, "MIN": 1, "MAX": 7, "STEP": 1, "COUNT": 3}.items():  # --array=1,3,7
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", str(value))
    assert "must be a range" in refused(capsys, *arguments_for(corpus, tmp_path / "s", tokenizer))


def test_ten_thousand_fuzzed_lines_among_good_ones(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every good document is in the shards, every bad line in quarantine with its reason."""
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100_000)
    chance = random.Random(11)
    lines, good, bad = [], {}, []
    kinds = [True] * 3000 + [False] * 10_000
    chance.shuffle(kinds)
    for number, is_good in enumerate(kinds, start=1):
        if is_good:
            line, (identity, text) = good_line(chance, number)
            good[identity] = text
        else:
            line, reason = bad_line(chance)
            bad += [(number, reason)] if reason else []
        lines.append(line)
    (tmp_path / "EN").mkdir()
    (tmp_path / "EN/x.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "EN/y.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    arguments = ["shard", "--input", tmp_path / "EN", "--output", tmp_path / "s", "--tokenizer", tokenizer]
    assert call(*arguments, "--unit-mb", "0.3") == 0
    shards = ShardSet.open(tmp_path / "s")
    assert len(shards.manifest["inputs"][0]["pieces"]) > 3
    stored = list(shards.documents())
    decode = shards.tokenizer().decode
    assert len(stored) == 2 * len(good)
    for document in stored:
        assert decode(document.tokens) == good[document.id]
    told = [json.loads(line) for line in (tmp_path / "s/quarantine.jsonl").read_text().splitlines()]
    for name in ("EN/x.jsonl", "EN/y.jsonl.gz"):
        assert [(e["line"], e["reason"]) for e in told if e["file"] == name] == bad
    assert len(bad) > 9000


# Stopped and restarted ---------------------------------------------------------------------------------


def wait_for(what, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, "the command ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One large file: units enough for a run to be stopped in the middle many times."""
    folder = tmp_path_factory.mktemp("long") / "EN"
    lines = [
        json.dumps({"id": str(n), "content": f"{n} " + tokenizer_folders.ENGLISH * 4}) for n in range(6000)
    ]
    write_lines(folder / "part.jsonl", lines)
    return folder


LONG = ("--shard-documents", "100", "--unit-mb", "0.1")


@pytest.fixture(scope="module")
def long_shards(long_corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("long-reference") / "shards"
    assert call(*arguments_for(long_corpus, output, tokenizer, *LONG, "--workers", "2")) == 0
    return output


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A suite that a script runs in the background has Ctrl-C ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_killed_while_it_merges_it_is_finished_by_many(corpus: Path, tokenizer: Path, tmp_path: Path):
    many = ("--shard-documents", "2")  # hundreds of files to move
    assert call(*arguments_for(corpus, tmp_path / "whole", tokenizer, *many)) == 0
    killed = 0
    for attempt in range(10):
        output = tmp_path / f"s{attempt}"
        arguments = arguments_for(corpus, output, tokenizer, *many, "--workers", "1")
        process = start(arguments)
        moved = attempt * 20
        wait_for(lambda o=output, n=moved: len(list(o.glob("shard-*"))) > n, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += not (output / "manifest.json").exists()
        assert call(*arguments[:-1], "4") == 0
        assert contents(output) == contents(tmp_path / "whole")
        if killed == 3:
            return
    raise AssertionError(f"only {killed} kills came before the end of a merge")


def test_what_a_crash_of_the_machine_cut_short_is_made_again(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    assert call(*arguments_for(corpus, tmp_path / "whole", tokenizer, "--deduplicate")) == 0
    kinds = ["shard/000002/part-000.tar", "shard/000002/part-000.index.npy", "shard/000003/quarantine.jsonl"]
    kinds += ["shard/000001/record.json", "shard/000001/sizes.json"]
    kinds += ["hash/000004/hashes.bin", "duplicates/000000/000001.json", "plan.json"]
    for number, kind in enumerate(kinds):
        output = tmp_path / str(number)
        place = units if kind.startswith("hash") else units.Worker if "dup" in kind else run
        name = {units: "find_duplicates", units.Worker: "shard_unit", run: "merge"}[place]
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stop)
            assert call(*arguments_for(corpus, output, tokenizer, "--deduplicate")) == 130
        path = output / ".unfinished" / kind
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert call(*arguments_for(corpus, output, tokenizer, "--deduplicate")) == 0, kind
        assert contents(output) == contents(tmp_path / "whole"), kind


@pytest.mark.parametrize("plan", [True, False])
def test_what_a_kill_left_beside_a_finished_set_is_removed(
    plan: bool, corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path
):
    shutil.copytree(shards, tmp_path / "s")
    work = tmp_path / "s/.unfinished/shard/000001"
    work.mkdir(parents=True)
    (work / "record.json").write_text("{}")
    if plan:
        (tmp_path / "s/.unfinished/plan.json").write_text('{"only": null}')
    assert call(*arguments_for(corpus, tmp_path / "s", tokenizer)) == 0
    assert contents(tmp_path / "s") == contents(shards)


def test_several_mend_a_set_together(corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path):
    shutil.copytree(shards, tmp_path / "s")
    for path in sorted((tmp_path / "s").glob("*.tar"))[::2]:
        path.unlink()
    running = []
    for _ in range(4):
        running.append(start(arguments_for(corpus, tmp_path / "s", tokenizer)))
        time.sleep(0.3)
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    assert contents(tmp_path / "s") == contents(shards)


def test_launches_at_the_same_time_make_one_set(corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path):
    running = [start(arguments_for(corpus, tmp_path / "s", tokenizer, "--workers", "2")) for _ in range(3)]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    assert contents(tmp_path / "s") == contents(shards)


def test_ctrl_c_is_quiet_and_finished_units_are_kept(
    long_corpus: Path, long_shards: Path, tokenizer: Path, tmp_path: Path
):
    output = tmp_path / "shards"
    arguments = arguments_for(long_corpus, output, tokenizer, *LONG, "--workers", "2")
    process = start(arguments)
    done = output / ".unfinished/shard"
    wait_for(lambda: done.is_dir() and len(list(done.iterdir())) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err == b"data-prep: interrupted\n"
    kept, broken = sorted(done.iterdir())[:2]
    inode = (kept / "part-000.tar").stat().st_ino
    (broken / "part-000.tar").write_bytes(b"cut short by a crash of the machine")  # noticed and made again
    assert call(*arguments) == 0
    entries = ShardSet.open(output).manifest["shards"]
    final = next(entry["file"] for entry in entries if entry["unit"] == int(kept.name))
    assert (output / final).stat().st_ino == inode  # not made again
    assert contents(output) == contents(long_shards)


def test_a_run_stopped_while_it_merges_goes_on(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "shards"
    real = os.replace
    moved = []

    def replace(source: Path, target: Path) -> None:
        if Path(target).parent == output:
            moved.append(target)
            if len(moved) == 8:
                raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert call(*arguments_for(corpus, output, tokenizer)) == 130
    assert len(list(output.glob("shard-*"))) == 7
    with monkeypatch.context() as patch:
        patch.setattr(units.Worker, "shard_unit", None)  # nothing needs to be made again
        assert call(*arguments_for(corpus, output, tokenizer)) == 0
    assert contents(output) == contents(shards)


def test_units_of_a_killed_worker_run_again(
    long_corpus: Path, long_shards: Path, tokenizer: Path, tmp_path: Path
):
    output = tmp_path / "shards"
    process = start(arguments_for(long_corpus, output, tokenizer, *LONG, "--workers", "2"))
    wait_for(lambda: (output / ".unfinished/shard").is_dir(), process)
    children = psutil.Process(process.pid).children(recursive=True)
    worker = max(children, key=lambda child: child.cpu_times().user)
    worker.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.decode().count("warning: a worker process was killed") == 1
    assert b"Traceback" not in err
    assert contents(output) == contents(long_shards)


# Afterwards --------------------------------------------------------------------------------------------


def test_running_again_finds_the_work_done(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    before = contents(shards)
    assert call(*arguments_for(corpus, shards, tokenizer, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["already_there"] is True
    assert contents(shards) == before
    assert "other settings" in refused(
        capsys, *arguments_for(corpus, shards, tokenizer, "--max-tokens", "32")
    )
    other = tokenizer_folders.byte_level(tmp_path / "other", vocab_size=500)
    assert "another tokenizer" in refused(capsys, *arguments_for(corpus, shards, other))
    assert "other input" in refused(capsys, *arguments_for(corpus / "EN", shards, tokenizer))
    shutil.copytree(corpus, tmp_path / "corpus")
    path = tmp_path / "corpus/EN/books/part-000000.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0-1", b"0-0"))
    said = refused(capsys, *arguments_for(tmp_path / "corpus", shards, tokenizer))
    assert "made from another books/part-000000.jsonl" in said


def test_a_damaged_shard_is_made_again_from_its_own_input(
    corpus: Path,
    shards: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    shutil.copytree(shards, tmp_path / "s")
    path = tmp_path / "s/shard-000005.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    assert "run the same `data-prep shard` again" in refused(capsys, "verify", tmp_path / "s")
    path.unlink()
    made = []
    real = units.Worker.shard_unit

    def shard_unit(worker, unit: int, *others: object) -> None:
        made.append(unit)
        real(worker, unit, *others)

    monkeypatch.setattr(units.Worker, "shard_unit", shard_unit)
    assert call(*arguments_for(corpus, tmp_path / "s", tokenizer)) == 0
    assert made == [ShardSet.open(shards).manifest["shards"][5]["unit"]]
    assert contents(tmp_path / "s") == contents(shards)


# Duplicates --------------------------------------------------------------------------------------------


def test_of_equal_texts_the_first_stays_at_any_number_of_workers(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path
):
    for workers in ("1", "3"):
        arguments = arguments_for(
            corpus, tmp_path / workers, tokenizer, "--deduplicate", "--workers", workers
        )
        assert call(*arguments) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    first: dict[int, str] = {}
    for document in ShardSet.open(shards).documents():
        first.setdefault(document.text_hash, document.id)
    kept = ShardSet.open(tmp_path / "1")
    assert [document.id for document in kept.documents()] == list(first.values())
    dropped = ShardSet.open(shards).manifest["totals"]["documents"] - len(first)
    assert kept.manifest["rejected"]["duplicate"] == dropped > 20
    assert verify(tmp_path / "1")["ok"]
    assert verify_deep(tmp_path / "1", [str(corpus)])["compared"] == len(first)


def test_more_units_than_files_may_be_open(long_corpus: Path, tokenizer: Path, tmp_path: Path):
    arguments = arguments_for(long_corpus, tmp_path / "s", tokenizer, "--deduplicate", *LONG)
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)),
    )
    assert done.returncode == 0, done.stderr
    assert len(ShardSet.open(tmp_path / "s").manifest["inputs"][0]["pieces"]) > 40


def test_duplicates_in_many_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The way of large corpora gives what a plain loop gives."""
    monkeypatch.setattr(duplicates, "BUCKETED_ABOVE", 100)
    chance = random.Random(5)
    seen, files, expected = set(), [], []
    for unit in range(30):
        texts = [str(chance.randrange(700)).encode() for _ in range(chance.randrange(60))]
        hashes = [duplicates.hash128(text) for text in texts]
        expected.append([n for n, one in enumerate(hashes) if one in seen or seen.add(one)])
        files.append(tmp_path / f"{unit}.bin")
        duplicates.write_hashes(files[-1], b"".join(hashes))
    assert [found.tolist() for found in duplicates.find(files)] == expected


# Split -------------------------------------------------------------------------------------------------


def test_split_is_by_content_and_complete(shards: Path, tokenizer: Path, corpus: Path, tmp_path: Path):
    parts = parse_parts(["train=0.8", "valid=0.1", "test=0.1"])
    result = split(shards, tmp_path / "a", parts)
    sets = {name: ShardSet.open(tmp_path / "a" / name) for name in parts}
    where: dict[int, str] = {}
    stored = {d.id: d for d in ShardSet.open(shards).documents()}
    seen = []
    for name, shard_set in sets.items():
        assert verify(tmp_path / "a" / name)["ok"] and verify_deep(tmp_path / "a" / name)["decoded"]
        assert shard_set.manifest["totals"]["documents"] == result[name]["documents"] > 0
        for document in shard_set.documents():
            assert where.setdefault(document.text_hash, name) == name  # equal texts stay together
            assert document.tokens.tolist() == stored[document.id].tokens.tolist()
            seen.append(document.id)
    assert sorted(seen) == sorted(d.id for d in ShardSet.open(shards).documents())
    assert 0.6 < result["train"]["documents"] / len(seen) < 0.95
    split(shards, tmp_path / "b", parts)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    # Another tokenizer, fewer documents, another order: no document changes its part.
    other = tokenizer_folders.byte_level(tmp_path / "other", vocab_size=500)
    assert call(*arguments_for(corpus / "CN", tmp_path / "cn", other)) == 0
    split(tmp_path / "cn", tmp_path / "c", parts)
    for name in parts:
        for document in ShardSet.open(tmp_path / "c" / name).documents():
            assert where[document.text_hash] == name
    split(shards, tmp_path / "d", parts, seed=1)
    assert contents(tmp_path / "d") != contents(tmp_path / "a")


def test_split_refuses(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def say(*parts: str) -> str:
        return refused(capsys, "split", shards, "--output", tmp_path / "x", "--parts", *parts)

    assert "add up to 1" in say("train=0.5", "valid=0.4")
    assert "names must differ" in say("a=0.5", "a=0.5")
    for wrong in ("train", "train=x", "../x=1", "a=nan", "a=-1", "=1"):
        assert "write NAME=SHARE" in say(wrong)
    assert "'few' would be empty" in say("many=0.9999999", "few=0.0000001")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").touch()
    assert "not empty" in refused(capsys, "split", shards, "--output", tmp_path / "full", "--parts", "a=1")
    assert "lies inside" in refused(capsys, "split", shards, "--output", shards / "x", "--parts", "a=1")


def test_the_engine_that_makes_the_ids_changes_no_byte(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert isinstance(load_tokenizer(tokenizer), ByteLevelTokenizer)
    monkeypatch.setenv("DATA_PREP_TOKENIZER", "hf")
    assert call(*arguments_for(corpus, tmp_path / "s", tokenizer)) == 0
    assert contents(tmp_path / "s") == contents(shards)
