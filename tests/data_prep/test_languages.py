"""Languages identified by their letters (`--identify-lang`): identifier, precedence of labels, shards."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from helpers import tokenizer_folders
from helpers.data_prep_command import call, refused

from data_prep.common.errors import UserError
from data_prep.common.identify import _model, identifier, identify
from data_prep.corpus.filters import Filters
from data_prep.shards.reader import ShardSet

TEXTS = {
    "en": "The river rose in the night. By morning the lower road was under water, and none of us could "
    "reach the mill. We carried the books upstairs and waited for the rain to stop.",
    "de": "In der Nacht stieg der Fluss. Am Morgen stand die Straße tief im Wasser, und niemand kam "
    "mehr zur Mühle. Wir trugen die Bücher nach oben und warteten, bis der Regen aufhörte.",
    "fr": "La rivière est montée pendant la nuit. Au matin, la route basse était sous l'eau et personne ne "
    "pouvait atteindre le moulin. Nous avons porté les livres à l'étage.",
    "es": "El río creció durante la noche. Por la mañana el camino bajo estaba cubierto de agua y nadie "
    "podía llegar al molino. Subimos los libros y esperamos a que dejara de llover.",
    "cs": "V noci se řeka zvedla. Ráno byla dolní cesta pod vodou a nikdo se nemohl dostat ke mlýnu. Odnesli "
    "jsme knihy nahoru a čekali, až přestane pršet.",
    "hu": "Éjszaka megáradt a folyó. Reggelre az alsó út víz alatt volt, és senki sem tudott eljutni a "
    "malomhoz. Felvittük a könyveket az emeletre, és vártuk, hogy elálljon az eső.",
    "ru": "Ночью река поднялась. К утру нижняя дорога оказалась под водой, и никто не мог добраться до "
    "мельницы. Мы отнесли книги наверх и ждали, когда кончится дождь.",
    "vi": "Đêm qua nước sông dâng cao. Đến sáng con đường phía dưới đã ngập nước và không ai có thể đến được "
    "cối xay. Chúng tôi mang sách lên lầu và chờ mưa tạnh.",
    "ar": "ارتفع منسوب النهر في الليل. وفي الصباح كان الطريق السفلي تحت الماء ولم يستطع أحد الوصول إلى "
    "الطاحونة. حملنا الكتب إلى الأعلى وانتظرنا توقف المطر.",
    "th": "เมื่อคืนนี้แม่น้ำเอ่อขึ้น ตอนเช้าถนนด้านล่างอยู่ใต้น้ำและไม่มีใครไปถึงโรงสีได้ เราขนหนังสือขึ้นไปชั้นบนและรอให้ฝนหยุดตก",
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_language_is_identified_by_its_letters(language: str) -> None:
    found, confidence = identify(TEXTS[language])
    assert found == language and 0.5 < confidence <= 1
    assert identify(TEXTS[language].upper())[0] == language


@pytest.mark.parametrize("text", ["", " \n", "3.14 2.72 1.41", "!!!", "😀😀", "https://a.b/c?d=e"])
def test_no_letters_no_language(text: str) -> None:
    assert identify(text)[1] < 0.5


def test_the_script_comes_first() -> None:
    """A quotation in another script, with more bytes a letter, does not outweigh the text around it."""
    for other in ("ru", "ar", "th"):
        assert identify(f"{TEXTS['en'][:70]} {TEXTS[other][:50]} {TEXTS['en'][70:140]}")[0] == "en"
    assert identify("Компания Microsoft Windows представила новую версию редактора Visual Studio.")[0] == "ru"
    assert identify("โปรแกรม LibreOffice Writer ช่วยให้คุณเขียนจดหมายและรายงานได้ง่ายขึ้น")[0] == "th"


def test_the_majority_of_a_long_text_decides() -> None:
    english, german = (TEXTS[name] + " " for name in ("en", "de"))
    mixed = german * 2 + english * 14 + german * 2  # the beginning and the end are the minor language
    language, confidence = identify(mixed)
    assert language == "en" and confidence < identify(english * 18)[1]


def test_a_long_text_costs_no_more() -> None:
    def seconds(text: str) -> float:
        begin = time.process_time()
        for _ in range(20):
            identify(text)
        return time.process_time() - begin

    identify("x")
    assert seconds(TEXTS["en"] * 20_000) < 5 * seconds(TEXTS["en"] * 20)


def test_labels_come_first_and_folders_after() -> None:
    rules = Filters(identify_language=True)
    assert rules.language_of({"language": "Chinese"}, TEXTS["de"], "en") == ("zh", None)
    assert rules.language_of({"language": "und"}, TEXTS["de"], "en")[0] == "de"
    assert rules.language_of({}, TEXTS["de"], "en")[0] == "de"
    language, confidence = rules.language_of({}, "3.14 2.72", "en")
    assert language == "en" and confidence is not None and confidence < 0.5
    assert rules.language_of({}, "3.14 2.72", None)[0] == "und"
    assert (
        Filters(identify_language=True, min_confidence=1.0).language_of({}, "Dies da. Yes", None)[0] == "und"
    )
    assert Filters().language_of({}, TEXTS["de"], None) == ("en", None)


def test_settings_name_the_identifier() -> None:
    assert not {"identifier", "identify_language", "min_confidence"} & set(Filters().to_dict())
    rules = Filters(identify_language=True, min_confidence=0.7)
    settings = json.loads(json.dumps(rules.to_dict()))
    assert settings["identifier"] == identifier() and Filters.from_dict(settings) == rules
    with pytest.raises(UserError, match="py3langid 0.0, 1, which is not installed"):
        Filters.from_dict(settings | {"identifier": "py3langid 0.0, 1"})
    with pytest.raises(UserError, match="--identify-lang"):
        Filters(min_confidence=0.7)


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for module in ("py3langid", "py3langid.langid"):
        monkeypatch.setitem(sys.modules, module, None)
    _model.cache_clear()  # another test may have loaded it
    words = ["shard", "--input", "x", "--output", "y", "--tokenizer", "z", "--identify-lang"]
    assert "sentence-llm[lang]" in refused(capsys, *words)


def test_a_language_that_cannot_be_found_is_refused(capsys: pytest.CaptureFixture) -> None:
    words = ["shard", "--input", "x", "--output", "y", "--tokenizer", "z", "--identify-lang"]
    error = refused(capsys, *words, "--keep-lang", "en", "vot", "yi")
    assert "cannot find vot, yi; it knows ace af am " in error and "zxx" not in error


def test_a_fixed_language_is_not_identified(capsys: pytest.CaptureFixture) -> None:
    words = ["shard", "--input", "x", "--output", "y", "--tokenizer", "z", "--identify-lang", "--lang", "en"]
    assert "--lang en" in refused(capsys, *words)


def test_a_mixture_of_ten_languages(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"id": f"{name}{n}", "content": text[n:]} for n in range(3) for name, text in TEXTS.items()]
    rows.append({"id": "named", "content": TEXTS["de"], "language": "eng"})
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_folders.byte_level(tmp_path / "tokenizer")
    basic = ["shard", "--input", corpus, "--tokenizer", tokenizer, "--keep-lang", "en", "cs", "vi"]

    def made(name: str, *words: str) -> ShardSet:
        assert call(*basic, "--output", tmp_path / name, *words) == 0
        return ShardSet.open(tmp_path / name)

    by_script = made("script")
    said = capsys.readouterr().err
    assert said.count("--identify-lang") == 1 and "German is en" in said
    assert {d.id[:2] for d in by_script.documents()} == {"en", "de", "fr", "es", "cs", "hu", "vi", "na"}
    assert all(document.confidence is None for document in by_script.documents())

    found = made("letters", "--identify-lang")
    assert "--identify-lang" not in capsys.readouterr().err
    documents = {document.id: document for document in found.documents()}
    assert sorted(documents) == sorted(
        [f"{name}{n}" for n in range(3) for name in ("en", "cs", "vi")] + ["named"]
    )
    assert documents.pop("named").confidence is None
    assert all(document.confidence > 0.5 for document in documents.values())
    assert {name: counts["documents"] for name, counts in found.manifest["languages"].items()} == {
        "cs": 3,
        "en": 4,
        "vi": 3,
    }
    assert found.manifest["rejected"]["language: de"] == 3
    assert found.fingerprint != by_script.fingerprint
    assert call("verify", tmp_path / "letters", "--deep", "--input", corpus) == 0
    capsys.readouterr()
    assert call("show", tmp_path / "letters", "--id", "cs0") == 0
    assert f"(cs {documents['cs0'].confidence:.2f}, " in capsys.readouterr().out
    parts = ["--parts", "a=0.5", "b=0.5"]
    assert call("split", tmp_path / "letters", "--output", tmp_path / "parts", *parts) == 0
    divided = [d for part in ("a", "b") for d in ShardSet.open(tmp_path / "parts" / part).documents()]
    assert {d.id: d.confidence for d in divided} == {d.id: d.confidence for d in found.documents()}


@pytest.mark.launch
def test_more_processes_make_the_same_set(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"content": text * (1 + n)}) for n in range(4) for text in TEXTS.values()]
    corpus.write_text("\n".join(rows) + "\n")
    tokenizer = tokenizer_folders.byte_level(tmp_path / "tokenizer")
    basic = ["shard", "--input", corpus, "--tokenizer", tokenizer, "--identify-lang", "--unit-mb", "0.01"]
    for workers in ("1", "2"):
        assert call(*basic, "--output", tmp_path / workers, "--workers", workers) == 0
    one, two = ((tmp_path / workers / "manifest.json").read_bytes() for workers in ("1", "2"))
    assert one == two and len(json.loads(one)["languages"]) == len(TEXTS)
