"""The benchmark of segmenters, and the text with known sentence ends that it reads."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import pytest

from tools.benchmarks import natural_text, segment_quality


def test_cases_golden_sets_and_natural_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases, golden_set, natural = tmp_path / "cases.jsonl", tmp_path / "set_en.jsonl", tmp_path / "natural"
    rows = [
        {"lang": "en", "text": "It rains. We stay.", "want": ["It rains.", "We stay."]},
        {"lang": "en", "text": "Mr. Fox ran.  He won.", "want": ["Mr. Fox", "ran.  He won."]},
    ]
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    golden_set.write_text(json.dumps({"cut": "One, ¦two.‖ Three."}) + "\n")
    natural.mkdir()
    (natural / "en.txt").write_text("It is late.\nSee no. 5 there\nWe go home.\n")
    (natural / "zh.txt").write_text("他走了。\n我来了。\n", encoding="utf-8")
    words = [str(cases), str(golden_set), "--natural", str(natural), "--cutters", "ours", "auto"]
    output = tmp_path / "result.json"
    assert segment_quality.main([*words, "--output", str(output), "--failures"]) == 0
    printed = capsys.readouterr()
    assert "want ['Mr. Fox', 'ran.  He won.']" in printed.err and "It rains" not in printed.err
    english, chinese = json.loads(output.read_text())["languages"]
    ours = english["cutters"]["ours"]
    assert (english["cases"], english["sentences"], ours["exact"]) == (3, 3, 2)
    # Of the two ends inside the paragraph the second has no stop.
    assert (ours["precision"], ours["recall"]) == (1.0, 0.5) and ours["mb_per_second"] > 0
    assert chinese["sentences"] == 2 and chinese["cutters"]["ours"]["recall"] == 1.0  # joined without a space
    assert "| en | 3 | 2 | 2 | 3 | 1.000 / 0.500 |" in printed.out


def test_speed_of_a_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.jsonl.gz"
    text.write_bytes(gzip.compress(json.dumps({"content": "One. Two.\n" * 50}).encode()))
    assert segment_quality.main(["--text", f"en={text}", "--cutters", "ours", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["languages"][0]
    assert row["bytes"] == 500 and row["cutters"]["ours"]["mb_per_second"] > 0


@pytest.mark.parametrize("line", ['{"topic": "no cut"}', '{"lang": "en", "text": "A."}', "[1]", "{"])
def test_bad_cases_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, line: str) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text(line + "\n")
    assert segment_quality.main([str(cases)]) == 2
    assert f"{cases}:1: not an object with lang, text and want" in capsys.readouterr().err


def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(ModuleNotFoundError):
        import sentencex  # noqa: F401
    assert segment_quality.main(["--languages", "en", "--cutters", "sentencex"]) == 2
    assert "sentence-llm[segmentation-benchmark]" in capsys.readouterr().err


@pytest.mark.parametrize("language", ["de", "hi", "xx"])
def test_other_cutters_know_some_languages(language: str) -> None:
    pytest.importorskip("sentencex")
    pytest.importorskip("pysbd")
    assert len(segment_quality.cutter("sentencex", language)("Ja. Nein.\nGut.")) == 3
    assert (segment_quality.cutter("pysbd", language) is None) == (language == "xx")


def catalogue(pairs: dict[str, str]) -> bytes:
    """A message catalogue (.mo)."""
    pairs = {"": "Content-Type: text/plain; charset=UTF-8\n", **pairs}
    data, tables = b"", [[], []]
    start = 28 + 16 * len(pairs)
    for number, words in enumerate((pairs.keys(), pairs.values())):
        for word in words:
            tables[number].append((len(word.encode()), start + len(data)))
            data += word.encode() + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + b"".join(struct.pack("<2I", *one) for table in tables for one in table) + data


def test_natural_text_keeps_what_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    usr, output = tmp_path / "tree" / "usr" / "share", tmp_path / "natural"
    messages = {
        "Show images, e.g. of cats.": "Zeigt Bilder, z. B. Katzen.",
        "menu\x04Close the window now.": "Schließt das Fenster.",
        "It failed. Try it again.": "Es misslang. Bitte wiederholen.",
        "Save the file and leave.": "Sichert die Datei. Danach endet es.",
        "Remove %s from the disk.": "Löscht %s von der Platte.",
        "This one is not translated.": "This one is not translated.",
        "Too short.": "Zu kurz.",
    }
    (usr / "locale/de/LC_MESSAGES").mkdir(parents=True)
    (usr / "locale/de/LC_MESSAGES/a.mo").write_bytes(catalogue(messages))
    (usr / "locale/de/LC_MESSAGES/b.mo").write_bytes(b"no catalogue")
    english = '.TH A 1\n.SH NAME\n.\\" comment\n.PP\nCall\n.BR open (2)\nwith a path.\n.nf\nint main.\n.fi\n'
    german = ".TH A 1\n.SH BEZEICHNUNG\n.PP\nRuft \\fBopen\\fP(2) mit einem\nPfad auf.\n.nf\nint main.\n.fi\n"
    for folder, page in (("man", english), ("man/de", german)):
        (usr / folder / "man1").mkdir(parents=True)
        (usr / folder / "man1/a.1.gz").write_bytes(gzip.compress(page.encode()))
    for folder, text in (
        ("C", "Press <gui>this</gui> key\n twice."),
        ("de", "Die <gui>Taste</gui> drücken."),
    ):
        (usr / "help" / folder / "guide").mkdir(parents=True)
        page = f'<page xmlns="http://projectmallard.org/1.0/"><p>{text}</p></page>'
        (usr / "help" / folder / "guide/a.page").write_text(page, encoding="utf-8")
    natural_text.write(tmp_path / "tree", output, 1)
    assert sorted((output / "de.txt").read_text(encoding="utf-8").splitlines()) == [
        "Die Taste drücken.",
        "Ruft open(2) mit einem Pfad auf.",
        "Schließt das Fenster.",
        "Zeigt Bilder, z. B. Katzen.",
    ]
    printed = capsys.readouterr()
    assert "de: 4 sentences" in printed.out and "b.mo: left out" in printed.err


@pytest.mark.parametrize(
    ("language", "translation", "kept"),
    [
        ("th", "ปิดหน้าต่างเดี๋ยวนี้", True),
        ("fr", "Ferme la fenêtre", False),
        ("ja", "窓を閉じる。", True),
        ("ja", "窓を閉じる。次へ。", False),
        ("ar", "أغلق النافذة. ثم غادر.", False),
        ("ar", "قال د. أحمد شيئا.", True),
        ("ru", "Close the window.", False),
    ],
)
def test_what_one_sentence_is(language: str, translation: str, kept: bool) -> None:
    found = natural_text.one_sentence("Close the window now.", translation, language)
    assert found == (translation if kept else None)
