"""The `data-prep` command as a user meets it: results, reproducibility, being killed and bad input."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tokenizer_folders
from helpers.data_prep_command import COMMAND, call, contents, refused
from helpers.paths import REPOSITORY

from data_prep.corpus.filters import MAX_TEXT_MB
from data_prep.shards.reader import ShardSet
from data_prep.text.segmenter import get_segmenter
from data_prep.text.sentences import SentenceSettings
from data_prep.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.launch


def run(*arguments: str | Path, status: int = 0, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """The real command in a separate process."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == status, done.stderr.decode()
    return done


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folders.byte_level(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of unequal size, plain and gzip, English and Chinese, some lines bad."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    for number in range(6):
        source = folder / ("CN/news" if number % 3 == 2 else "EN/books")
        source.mkdir(parents=True, exist_ok=True)
        text = tokenizer_folders.CHINESE if number % 3 == 2 else tokenizer_folders.ENGLISH
        lines = [
            json.dumps({"id": f"{number}-{n}", "content": f"{n}. " + text * (1 + n % 4)})
            for n in range(30 * (number + 1))
        ]
        if number == 1:
            lines[3:3] = ["{broken", "[]", '{"id": "x", "content": ""}']
            lines[9] = '{"content": "No id."}'
        data = "".join(f"{line}\n" for line in lines).encode()
        if number % 2:
            (source / f"part-{number:06d}.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (source / f"part-{number:06d}.jsonl").write_bytes(data)
    return folder


def shard_arguments(corpus: Path, output: Path, tokenizer: Path, *more: str | Path) -> list[str | Path]:
    basic = ["--input", corpus, "--output", output, "--tokenizer", tokenizer]
    return ["shard", *basic, "--segmenter", "clause", "--shard-documents", "50", *more]


@pytest.fixture(scope="module")
def shards(corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "shards"
    assert call(*shard_arguments(corpus, output, tokenizer)) == 0
    return output


# segment -----------------------------------------------------------------------------------------------

ODD = "One, two.\r\n\x85Three\u2028four.\x0b\x1c \0“第三。”\n\n 3.14 etc. end\r"


@pytest.mark.parametrize("segmenter", ["clause", "sentence"])
@pytest.mark.parametrize("lang", ["en", "zh", "auto"])
def test_segment_loses_nothing(tmp_path: Path, segmenter: str, lang: str):
    (tmp_path / "text.txt").write_bytes(ODD.encode())
    for argument, stdin in ((tmp_path / "text.txt", b""), ("-", ODD.encode())):
        out = run("segment", argument, "--lang", lang, "--segmenter", segmenter, stdin=stdin).stdout
        lines = out.decode("utf-8").splitlines()  # also at U+2028 and its like: they must be escaped
        sentences = [json.loads(line) for line in lines]
        assert "".join(sentences) == ODD
        assert sentences == get_segmenter(segmenter, lang)(ODD)
        assert len(sentences) > 2


def test_segment_of_nothing():
    assert run("segment").stdout == b""


def test_segment_of_bad_input(tmp_path: Path):
    for arguments, stdin, said in (
        (["-"], b"ok \xff", "not UTF-8 (byte 3)"),
        ([tmp_path / "nowhere"], b"", "cannot read"),
        ([tmp_path], b"", "cannot read"),
    ):
        err = run("segment", *arguments, status=2, stdin=stdin).stderr.decode()
        assert said in err and err.count("\n") == 1


# shard -------------------------------------------------------------------------------------------------


def test_the_place_of_the_corpus_changes_no_byte(corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path):
    place = tmp_path / "EN/elsewhere/CN/corpus"
    shutil.copytree(corpus, place)
    assert call(*shard_arguments(place, tmp_path / "shards", tokenizer)) == 0
    assert contents(tmp_path / "shards") == contents(shards)
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "shards").values())


def test_rejected_records_are_told(shards: Path):
    lines = (shards / "quarantine.jsonl").read_text(encoding="ascii").splitlines()
    name = "books/part-000001.jsonl.gz"
    assert [json.loads(line) for line in lines] == [
        {"file": name, "line": 4, "reason": "invalid JSON"},
        {"file": name, "line": 5, "reason": "not an object"},
        {"file": name, "line": 6, "reason": "empty content"},
    ]
    manifest = ShardSet.open(shards).manifest
    assert [entry["documents"] for entry in manifest["inputs"]] == [90, 180, 30, 60, 120, 150]
    ids = {d.id for d in ShardSet.open(shards).documents()}
    assert len([one for one in ids if one.startswith("books/part-000001.jsonl.gz@")]) == 1


def test_a_truncated_gzip_is_salvaged(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    lines = "".join(json.dumps({"id": str(n), "content": os.urandom(40).hex()}) + "\n" for n in range(200))
    whole = gzip.compress(lines.encode())
    path, output = tmp_path / "part.jsonl.gz", tmp_path / "shards"
    path.write_bytes(whole[: len(whole) // 2])
    assert "the gzip file ends too early" in refused(capsys, *shard_arguments(path, output, tokenizer))
    assert call(*shard_arguments(path, output, tokenizer, "--json", "--salvage")) == 3
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert 60 < summary["documents"] < 140 and summary["marked"] == {"salvaged": summary["documents"]}
    assert summary["rejected"] == {"damaged input": 1, "invalid JSON": 1}
    name, said = f"{tmp_path.name}/part.jsonl.gz", "the gzip file ends too early"
    damage = {"file": name, "offset": 0, "bytes": len(whole) // 2, "damage": said}
    assert summary["damaged"] == [damage] and f"warning: {name}: {said}" in err


def test_bad_input_to_shard(corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def say(inputs: Path, tokenizer: Path = tokenizer, output: Path = tmp_path / "out", *more: str) -> str:
        line = refused(capsys, *shard_arguments(inputs, output, tokenizer, *more))
        assert not (tmp_path / "out").exists()
        return line

    assert "does not exist" in say(tmp_path / "nowhere")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert "no usable document" in say(tmp_path / "empty.jsonl")
    assert "the files are empty" in say(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b"no json\n{}\nno json\n")
    assert "2 × invalid JSON, 1 × no content" in say(tmp_path / "bad.jsonl")
    (tmp_path / "nothing").mkdir()
    assert "holds no .jsonl" in say(tmp_path / "nothing")
    assert "holds no tokenizer" in say(corpus, tmp_path / "nothing")
    assert "tokenizer folder" in say(corpus, tmp_path / "nowhere")
    assert "between 4 and" in say(corpus, tokenizer, tmp_path / "out", "--max-tokens", "2")
    assert "is the input folder" in say(corpus, tokenizer, corpus / "EN/..")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_bytes(b"")
    assert "not empty" in say(corpus, tokenizer, tmp_path / "full")
    assert "is a file" in say(corpus, tokenizer, tmp_path / "full/file")
    assert "cannot write" in say(corpus, tokenizer, tmp_path / "full/file/below")


def test_packed_files_are_told_and_kept_in_the_manifest(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(corpus, tmp_path / "corpus")
    for name in ("EN/books/more.jsonl.br", "CN/news/more.zip"):
        (tmp_path / "corpus" / name).write_bytes(b"packed")
    capsys.readouterr()
    assert call(*shard_arguments(tmp_path / "corpus", tmp_path / "shards", tokenizer)) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "not read: 2 files passed over" in line and "news/more.zip" in line and "unpack" in line
    manifest = ShardSet.open(tmp_path / "shards").manifest
    assert manifest["not_read"] == ["news/more.zip", "books/more.jsonl.br"]
    known = ShardSet.open(shards).manifest
    assert known["not_read"] == [] and known["fingerprint"] == manifest["fingerprint"]


def test_places_that_cannot_be_written(corpus: Path, tokenizer: Path, tmp_path: Path):
    """One line with the place and the reason, status 2, whatever the command; as a process, so that no
    library's or interpreter's own words slip through.
    """
    (tmp_path / "file").write_bytes(b"")
    for output, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file/below", "Not a directory"),
        (Path("/proc/nowhere"), "No such file or directory"),  # cannot be made, not even by root
    ):
        for command in (
            ["tokenizer", "--input", corpus, "--vocab-size", "400"],
            ["shard", "--input", corpus, "--tokenizer", tokenizer],
        ):
            err = run(*command, "--output", output, status=2).stderr.decode()
            assert err.count("\n") == 1, err
            assert err.startswith("data-prep: error: ") and str(output.parent) in err, err
            assert reason in err or "is a file" in err, err
    assert "Not a directory" in run("segment", tmp_path / "file/below", status=2).stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_full_disk_is_told(shards: Path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "stats", str(shards)], stdout=full, stderr=subprocess.PIPE, cwd=REPOSITORY, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "data-prep: error: cannot read or write: No space left on device\n"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_write_that_fails_is_told_by_the_output_folder(
    corpus: Path, shards: Path, tokenizer: Path, tmp_path: Path, workers: str
):
    """As on a full disk, the error comes from a file that is open already, and names none."""

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    def say(*command: str | Path) -> str:
        arguments = [*COMMAND, *map(str, command)]
        done = subprocess.run(
            arguments, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=small_files_only
        )
        assert done.returncode == 2
        return done.stderr

    said = "data-prep: error: cannot write to {}: File too large\n"
    output = tmp_path / "shards"
    assert say(*shard_arguments(corpus, output, tokenizer, "--workers", workers)) == said.format(output)
    output = tmp_path / "parts"
    assert say("split", shards, "--output", output, "--parts", "a=1") == said.format(output)
    assert not output.exists()


def test_output_must_be_a_folder_of_this_machine(
    corpus: Path,
    shards: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    for command in (
        ("shard", "--input", corpus, "--tokenizer", tokenizer),
        ("split", shards, "--parts", "a=1"),
        ("tokenizer", "--input", corpus, "--vocab-size", "400"),
    ):
        for url in ("memory://x", "s3://bucket/x"):
            assert f"--output {url} is a URL" in refused(capsys, *command, "--output", url)
    assert not any(tmp_path.iterdir())


def test_units_have_a_least_size(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    arguments = shard_arguments(corpus, tmp_path / "shards", tokenizer, "--unit-mb")
    assert "--unit-mb must be at least 0.001, not 1e-07" in refused(capsys, *arguments, "1e-7")
    assert "at least 0.001" in refused(capsys, *arguments, "0.00099")
    assert not (tmp_path / "shards").exists()


def test_files_passed_over_are_told_once(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(corpus, tmp_path / "in")
    (tmp_path / "in/x.zip").write_bytes(b"")
    for command in (
        shard_arguments(tmp_path / "in", tmp_path / "shards", tokenizer),
        ("tokenizer", "--input", tmp_path / "in", "--output", tmp_path / "t", "--vocab-size", "400"),
    ):
        capsys.readouterr()
        assert call(*command) == 0
        assert capsys.readouterr().err.count("not read: 1 file passed over: in/x.zip; ") == 1


def test_names_that_are_not_utf8(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = os.fsencode(tmp_path) + b"/i\xffn"
    os.mkdir(folder)
    for name in (b"b\xffd.jsonl", b"t\xff.txt", b"z\xff.zip"):
        with open(folder + b"/" + name, "wb") as out:
            out.write(b'{"content": "No id."}\nbroken\n' if b"json" in name else b"A text.")
    given = [os.fsdecode(folder), os.fsdecode(folder + b"/t\xff.txt")]
    arguments = shard_arguments(given[0], tmp_path / "s", tokenizer)
    assert call(*arguments[:2], *given, *arguments[3:]) == 0
    assert [document.id for document in ShardSet.open(tmp_path / "s").documents()] == [
        r"i\xffn/b\xffd.jsonl@0",
        r"i\xffn/t\xff.txt",
    ]
    assert read_quarantine(tmp_path / "s")[0]["file"] == r"i\xffn/b\xffd.jsonl"
    assert call("verify", tmp_path / "s", "--deep", "--input", *given) == 0
    assert call("show", tmp_path / "s", "--count", "2") == 0


def test_memory_of_the_longest_document(tokenizer: Path, tmp_path: Path):
    """A word as long as a text may be, and one wide character, which makes Python keep all as four bytes."""
    text = "a" * (int(MAX_TEXT_MB * 1e6) - 40) + "😀"
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "0", "content": text}, ensure_ascii=False))
    arguments = list(map(str, shard_arguments(tmp_path / "x.jsonl", tmp_path / "shards", tokenizer)))
    # What the system tells of a child's peak begins with its parent's: the process looks for itself.
    code = f"from data_prep import cli; cli.main({arguments!r}); print(open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True, text=True
    )
    assert ShardSet.open(tmp_path / "shards").manifest["totals"]["bytes"] == len(text.encode())
    (peak,) = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("VmHWM:"))
    assert 50_000 < peak < 450_000  # kB


def test_an_explicit_language_wins(corpus: Path, tokenizer: Path, tmp_path: Path):
    """Below folders named CN, and from folders named EN and CN themselves."""
    made = []
    for place in ("CN/proj", "proj"):
        shutil.copytree(corpus, tmp_path / place / "corpus")
        output = tmp_path / "shards" / place
        assert call(*shard_arguments(tmp_path / place / "corpus", output, tokenizer, "--lang", "en")) == 0
        made.append(contents(output))
    assert made[0] == made[1]
    assert set(ShardSet.open(output).manifest["languages"]) == {"en"}


# verify, stats, show -----------------------------------------------------------------------------------


def test_verify(corpus: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert call("verify", shards) == 0
    assert "13 shards with 630 documents are whole" in capsys.readouterr().out
    assert call("verify", shards, "--deep", "--input", corpus) == 0
    assert "630 documents are the input's, byte for byte" in capsys.readouterr().out
    assert "give both" in refused(capsys, "verify", shards, "--input", corpus)
    assert call("verify", shards, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    shutil.copytree(shards, tmp_path / "copy")
    tar = tmp_path / "copy/shard-000004.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    assert "shard-000004.tar is cut short" in refused(capsys, "verify", tmp_path / "copy")
    assert "holds no manifest.json" in refused(capsys, "verify", tmp_path)


def test_show(shards: Path, capsys: pytest.CaptureFixture):
    assert call("show", shards, "--count", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [n for n, line in enumerate(lines) if line.startswith("──")]
    assert len(heads) == 2
    sentences = [json.loads(line.split("] ", 1)[1]) for line in lines[heads[0] + 1 : heads[1]]]
    first = next(ShardSet.open(shards).documents())
    assert "".join(sentences) == load_tokenizer(shards / "tokenizer").decode(first.tokens)
    assert len(sentences) == first.sentence_lengths.size


# tokenizer, demo-corpus --------------------------------------------------------------------------------


def test_tokenizer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("a", "b"):
        assert call("tokenizer", "--input", corpus, "--output", tmp_path / name, "--vocab-size", "400") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size == 400
    assert tokenizer.encode("他们又来到海边").size < 21
    line = refused(capsys, "tokenizer", "--input", corpus, "--output", tmp_path / "c", "--vocab-size", "9000")
    assert "too high" in line and "--vocab-size" in line
    assert not (tmp_path / "c").exists()


def test_demo_corpus(tiny_corpus: Path, tmp_path: Path):
    subprocess.run(
        [*COMMAND, "demo-corpus", "--output", str(tmp_path / "again")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True,
    )
    written = contents(tmp_path / "again")
    assert written == contents(tiny_corpus / "all")  # made by another process
    training = [name for name in written if name.startswith("EN/demo/part-")]
    valid = [name for name in written if name.startswith("valid/EN/demo/part-")]
    assert len(training) == 4 and len(valid) == 1 and len(written) == 5
    texts = {}
    for part, names in (("training", training), ("valid", valid)):
        records = [json.loads(line) for name in names for line in io.BytesIO(gzip.decompress(written[name]))]
        texts[part] = [record["content"] for record in records]
        assert all(record["id"] for record in records)
    everything = texts["training"] + texts["valid"]
    assert len(set(everything)) == len(everything)
    assert sum(map(len, everything)) > 1_500_000
    assert 0.02 < len(texts["valid"]) / len(everything) < 0.09
    assert any("docstring" in text for text in everything)


# The command itself ------------------------------------------------------------------------------------


def test_help_is_quick_and_has_an_example():
    code = "import sys, data_prep.cli.commands\n"
    code += "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True).stdout
    assert out.strip() == b"[]"
    assert b"example: data-prep shard" in run("--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no command"),
        ("shrad", 'Did you mean "shard"?'),
        ("verify shards --depe", "Did you mean --deep?"),
        ("verify", "FOLDER requires an argument"),
        ("show shards --count 0", "Must be >= 1"),
        ("show shards --count many", "must be a whole number, not 'many'"),
        ("split shards --output parts --parts", "--parts requires at least 1"),
        ("shard --input a --output b --tokenizer c --lang nolang", "language 'nolang' is not known"),
        ("shard --input a --output= --tokenizer c", "--output has no value"),
        ("tokenizer --input= --output b --vocab-size 9", "--input has no value"),
        ("shard --input a --output b --tokenizer c --unit-mb 0", "Must be > 0"),
        ("demo-corpus --output http://host/x", "--output http://host/x is a URL"),
        ("stage shards --to s3://bucket/x", "--to s3://bucket/x is a URL"),
        ("stats shards --html=s3://bucket/x.html", "--html s3://bucket/x.html is a URL"),
    ],
)
def test_impossible_arguments_are_refused(words: str, message: str, capsys: pytest.CaptureFixture):
    assert message in refused(capsys, *words.split())


def test_data_prep_never_imports_torch_or_the_pipeline(corpus: Path, tokenizer: Path, tmp_path: Path):
    arguments = [str(a) for a in shard_arguments(corpus, tmp_path / "shards", tokenizer)]
    code = (
        "import sys; from data_prep import cli; "
        f"cli.main({arguments!r}); cli.main(['verify', {str(tmp_path / 'shards')!r}]); "
        "sys.exit(bool({'torch', 'transformers', 'pipeline'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


def test_settings_reach_the_manifest(corpus: Path, tokenizer: Path, tmp_path: Path):
    more = ["--lang", "en", "--segmenter", "sentence", "--max-tokens", "16"]
    assert call(*shard_arguments(corpus / "EN", tmp_path / "shards", tokenizer), *more) == 0
    shards = ShardSet.open(tmp_path / "shards")
    assert shards.settings == SentenceSettings("sentence", "en", 16)
    assert max(document.sentence_lengths.max() for document in shards.documents()) == 16
    assert shards.manifest["settings"]["hygiene"]["min_chars"] == 0


def test_hygiene_and_format_reach_the_shards(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    rows = [
        {"id": "a", "body": {"text": "Kept,  as it is.\x07"}, "toxic_score": 0.1, "language": "en"},
        {"id": "b", "body": {"text": "Too toxic for us."}, "toxic_score": 0.9, "language": "en"},
        {"id": "c", "body": {"text": "Une phrase, deux virgules."}, "toxic_score": 0, "language": "fr"},
        {"id": "d", "body": {"text": "Hm."}, "toxic_score": 0, "language": "en"},
        {"id": "e", "body": {"text": "Kept, as it is."}, "toxic_score": 0, "language": "eng"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = [
        "--text-field",
        "body.text",
        "--filter",
        "toxic_score<0.5",
        "--keep-lang",
        "en",
        "--min-chars",
        "5",
    ]
    rules += [
        "--strip-control",
        "--white-space",
        "--deduplicate",
        "--compression",
        "zstd",
        "--min-tokens",
        "9",
    ]
    output = tmp_path / "shards"
    assert call(*shard_arguments(tmp_path / "x.jsonl", output, tokenizer, *rules, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rejected"] == {
        "duplicate": 1,
        "filter: toxic_score<0.5": 1,
        "language: fr": 1,
        "too short": 1,
    }
    assert summary["repaired"] == {"control characters removed": 1, "white space": 1}
    (document,) = ShardSet.open(output).documents()
    assert (document.id, document.sentence_lengths.size) == ("a", 1)  # two clauses, joined by --min-tokens
    assert load_tokenizer(tokenizer).decode(document.tokens) == "Kept, as it is."
    assert call("verify", output, "--deep", "--input", tmp_path / "x.jsonl") == 0
    names = {tuple(entry[key] for key in ("line", "reason")) for entry in read_quarantine(output)}
    assert names == {(5, "duplicate"), (2, "filter: toxic_score<0.5"), (3, "language: fr"), (4, "too short")}


def read_quarantine(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_stats_page_and_split(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert call("stats", shards, "--html", tmp_path / "stats.html") == 0
    assert "630 documents" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "stats.html").read_text(encoding="utf-8")
    assert "No such file" in refused(capsys, "stats", shards, "--html", tmp_path / "nowhere/stats.html")
    parts = ("--parts", "train=0.9", "valid=0.1")
    assert call("split", shards, "--output", tmp_path / "parts", *parts, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["train"]["documents"] + result["valid"]["documents"] == 630
    assert call("verify", tmp_path / "parts/valid") == 0
