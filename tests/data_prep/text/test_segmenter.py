"""The segmenter: nothing is lost, cuts stand where a reader would put them, and it knows a finished sentence.

Golden sets: `data/segment_{en,zh,other}.jsonl`, one case a line. In `cut`, `‖` is a cut of both segmenters
and `¦` one of `clause` only; the text is `cut` without them. `known` says why a case is cut otherwise.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace

import pytest
from helpers.paths import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.common.errors import UserError
from data_prep.text.language_rules import CODES, line_rules, rules_for
from data_prep.text.marks import CLOSERS, DASHES, ELLIPSES, FAR_LETTERS, PAUSES, STOPS
from data_prep.text.scanners import scanner
from data_prep.text.segmenter import NAMES, Segmenter, get_segmenter
from data_prep.text.sentences import SentenceSettings

# The same examples every time, nothing kept between runs.
REPRODUCIBLE = settings(derandomize=True, database=None, deadline=None)
# One language of each kind: with and without case, ordinals, short abbreviations, spaces as ends.
LANGUAGES = ("en", "zh", "ja", "de", "ru", "ar", "hi", "th", "other", "auto")
PAIRS = [get_segmenter(name, language) for name in NAMES for language in LANGUAGES]

# Fragments that rules look at, so that random joins of them reach the rules; and any character at all.
FRAGMENTS = (
    ". ! ? ... … …… 。 ！ ？ ． ｡ , ; : ， ； ： 、 — —— -- - – ⸺ \" ' “ ” ‘ ’ 「 」 『 』 《 》 "
    "( ) （ ） [ ] [1] ` $ * _ 3.14 1,234.5% 12:30 e.g. i.e. U.S. Mr. Dr. No. p.m. J. R. etc. 1. A. IV. "
    "The he I said Jim https://a.b/c?d=e,f a@b.co v1.2.3 main.rs .NET 你好 他说 的 三 １ ａ かな é e\u0301 "
    "😀 👍🏽 ⁉\ufe0f \u200d \u0301 \u200b \ufeff \x00 \x07 word me. part. will. Jim. Mrs. ill. ！” 。」 "
    "一、 二， Привет т. е. н. Он г. 5 न। डॉ. वह ؟ ، ; ῥῶ; ። ¿Qué? « » „ ‹ \U000115c2 a.b z. B. Mai "
    "Der XIV. 12. [1,2] [12]:34 [note 1] ¹ Yahoo! 」と 。」の （ ） \u200f \u202b \u202c د. ثم ის. "
    "ฉัน เขา ๆ พ.ศ. - --help v. Chr. kg. str."
).split(" ") + " |  |\n|\r\n|\r|\t|\x0b|\x0c|\x1c|\x85|\u2028|\u2029|\u3000|\xa0".split("|")
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
RULE_TEXT = st.lists(st.sampled_from(FRAGMENTS) | ANY_TEXT.map(lambda text: text[:3]), max_size=40).map(
    "".join
)
TEXTS = ANY_TEXT | RULE_TEXT


def golden(language: str) -> list[dict]:
    path = REPOSITORY / "tests" / "data" / f"segment_{language}.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{**case, "language": language} for case in cases]


GOLDEN = golden("en") + golden("zh") + golden("other")
CASES = [  # sentence cuts by language
    {**json.loads(line), "language": path.stem}
    for path in sorted((REPOSITORY / "tests" / "data" / "segmentation").glob("*.jsonl"))
    for line in path.read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['language']}-{case['topic']}")
def test_golden(case: dict) -> None:
    cut = case["cut"]
    text = cut.replace("‖", "").replace("¦", "")
    for chosen in (case["language"], "auto") if case["language"] != "other" else ("other",):
        sentences = get_segmenter("sentence", chosen)(text)
        clauses = get_segmenter("clause", chosen)(text)
        as_wanted = sentences == cut.replace("¦", "").split("‖") and clauses == re.split("[‖¦]", cut)
        assert as_wanted != ("known" in case), (sentences, clauses)


def cut_alike(language: str, case: dict) -> bool:
    pieces = SentenceSettings("sentence", "auto", 64).segmenter_for(language)(case["cut"].replace("‖", ""))
    return [piece.strip() for piece in pieces] == [piece.strip() for piece in case["cut"].split("‖")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['language']}-{case['topic']}")
def test_languages(case: dict) -> None:
    by_label = cut_alike(case["language"], case)
    assert by_label != ("known" in case)
    assert by_label or not cut_alike("auto", case)


def test_every_language_has_cases() -> None:
    assert {case["language"] for case in CASES} == set(CODES) - {"other"}
    for code in CODES:
        mine = [case for case in CASES if case["language"] == code]
        assert len({case["topic"] for case in mine}) == len(mine)
        assert sum("known" in case for case in mine) <= len(mine) // 6
        assert rules_for(code).name


def test_golden_sets_are_whole() -> None:
    for language, least in (("en", 150), ("zh", 150), ("other", 20)):
        cases = golden(language)
        assert len(cases) >= least
        assert len({case["topic"] for case in cases}) == len(cases)
        assert len({case["cut"] for case in cases}) == len(cases)
        assert sum("known" in case for case in cases) <= len(cases) // 20


def test_examples_of_the_page_are_golden() -> None:
    page = (REPOSITORY / "docs" / "segmentation.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in page.split("## Measured")[0].splitlines() if line.startswith("| ")]
    rows = [row for row in rows if "`" in row]
    examples = [example.strip().strip("`").strip() for row in rows for example in row.split(" · ")]
    assert len(examples) > 40
    assert not set(examples) - {case["cut"] for case in GOLDEN if "known" not in case}


@settings(REPRODUCIBLE, max_examples=600)
@given(TEXTS)
def test_lossless(text: str) -> None:
    for segmenter in PAIRS:
        pieces = segmenter(text)
        assert "".join(pieces) == text
        assert all(pieces)


@settings(REPRODUCIBLE, max_examples=400)
@given(TEXTS)
def test_every_end_has_a_reason(text: str) -> None:
    """A sentence ends in a mark (and what closes it) or at a line break; white space opens the next one, and
    no accent, joiner or variation selector is parted from what it belongs to."""
    extenders = "\u200d\u20e3" + "".join(map(chr, [*range(0x300, 0x370), *range(0xFE00, 0xFE10)]))
    closers = CLOSERS + extenders
    for segmenter in PAIRS:
        pieces = segmenter(text)
        for piece, following in zip(pieces, pieces[1:], strict=False):
            assert piece == piece.rstrip()
            assert following.strip()
            assert following[0] not in extenders
            space = following[: len(following) - len(following.lstrip())]
            assert any(character.isalnum() for character in piece)
            if "".join(space.splitlines()) != space:
                continue
            end = re.sub(rf"(\[\d{{1,3}}\][{re.escape(closers)}]*)+$", "", piece).rstrip(closers)[-1]
            assert end in STOPS + ELLIPSES + DASHES + "-" + (PAUSES if segmenter.name == "clause" else "")


@settings(REPRODUCIBLE, max_examples=800)
@given(TEXTS)
def test_the_fast_path_changes_no_cut(text: str) -> None:
    for segmenter in PAIRS:
        assert segmenter.cuts(text) == replace(segmenter, judge_all=True).cuts(text)


@pytest.mark.parametrize("language", CODES)
def test_the_fast_path_knows_every_listed_word(language: str) -> None:
    rules = rules_for(language)
    lists = (
        rules.never_last | rules.numbered | rules.sometimes_last | rules.last | rules.units | rules.shortened
    )
    plain = {
        "ii",
        "iv",
        "xl",
        "viii",
        "ill",
        "rest",
        "xmrs",
        "a.etc",
        "x-fig",
        "слово",
        "سلام",
        "घर",
        *rules.names,
    }
    first = rules.first_word
    frames = (
        "{}. The 5 men",
        "It is {}. The end",
        f"3 {{}}. {first} 5 «{{}}. Öl",
        "(as {}.) “No. {}. 5 {}. i",
        "A {}.” Then",
        "A {}. C. S. Lewis",
    )
    forms = {form for word in lists | plain for form in (word, word.capitalize(), word.upper())}
    text = "\n".join(f"Foo {frame.replace('{}', form)}" for form in sorted(forms) for frame in frames)
    for name in NAMES:
        segmenter = get_segmenter(name, language)
        pieces, judged = segmenter(text), replace(segmenter, judge_all=True)(text)
        assert pieces == judged, [pair for pair in zip(pieces, judged, strict=False) if pair[0] != pair[1]][
            :1
        ]


def test_the_fast_path_takes_most_cuts() -> None:
    """On the golden sets, so that it cannot be switched off unnoticed."""
    for language in ("en", "zh"):
        for name in NAMES:
            sure = found = 0
            for case in golden(language):
                text = re.sub("[‖¦]", "", case["cut"])
                runs = list(scanner(name, rules_for(language)).finditer(text))
                sure += sum(run.lastindex is None for run in runs)
                found += len(get_segmenter(name, language).cuts(text)) - 1
            assert sure > found / 4


@settings(REPRODUCIBLE, max_examples=600)
@given(TEXTS)
def test_cuts_ascend_to_the_end(text: str) -> None:
    for segmenter in PAIRS:
        cuts = segmenter.cuts(text)
        assert cuts == sorted(set(cuts))
        assert cuts[-1:] == ([len(text)] if text else [])
        assert all(cut > 0 for cut in cuts)


@settings(REPRODUCIBLE, max_examples=300)
@given(TEXTS)
def test_lines_are_cut_alone(text: str) -> None:
    """A line with words is cut alike whatever the lines around it; one without joins the line before."""
    for segmenter in PAIRS:
        lines = [line for line in text.splitlines() if any(map(str.isalnum, line))]
        alone = [piece for line in lines for piece in segmenter(line)]
        if lines:
            pieces = segmenter(text)
            assert len(pieces) == len(alone)
            for piece, expected in zip(pieces, alone, strict=True):
                assert expected.strip() in piece
                assert not any(map(str.isalnum, piece.replace(expected.strip(), "", 1)))


@settings(REPRODUCIBLE, max_examples=300)
@given(TEXTS)
def test_complete_agrees_with_cutting(text: str) -> None:
    """`is_complete` says what happens when more text follows, here after a space and after a line break."""
    for segmenter in PAIRS:
        if not text.strip():
            assert segmenter.is_complete(text)
            continue
        assert segmenter.is_complete(text + "\n") == any(map(str.isalnum, text))
        if segmenter.language in ("auto", "other") and FAR_LETTERS.search(text):
            continue  # the next word may make another language of a line of few letters
        body = text.rstrip()
        line = body.splitlines()[-1]
        ends, at = set(), 0
        for piece in segmenter(f"{body} {line_rules(segmenter.language, line, 0, len(line))[0].first_word}"):
            at += len(piece)
            ends.add(at)
        if segmenter.is_complete(body + " "):
            assert len(body) in ends
        elif (
            segmenter.language == "en"
        ):  # beside Chinese characters a continuation without a space is tried too
            assert len(body) not in ends


@pytest.mark.parametrize("segmenter", PAIRS, ids=lambda s: f"{s.name}-{s.language}")
def test_ends_of_the_range(segmenter: Segmenter) -> None:
    assert segmenter("") == []
    for text in (" ", "\n\n", "a", ".", "\u2028", "。", "\x00", "\U0010ffff"):
        assert segmenter(text) == [text]
    assert segmenter(" \n a. \n") == [" \n a. \n"]
    assert segmenter("a\u2028b\x85c\rd") == ["a", "\u2028b", "\x85c", "\rd"]
    assert pickle.loads(pickle.dumps(segmenter)) == segmenter


@pytest.mark.parametrize(
    ("text", "sentence", "clause"),
    [
        ("", True, True),
        ("It was late.", True, True),
        ("It was late. ", True, True),
        ("It was late", False, False),
        ("It was late\n", True, True),
        ("It was late,", False, True),
        ("It was late, and", False, False),
        ("First: ", False, True),
        ("“Stop!”", True, True),
        ("“Stop,”", False, True),
        ("Was it so?)", True, True),
        ("We met Mr.", False, False),
        ("Some fruit, e.g.", False, False),
        ("See p. 5 and No.", True, True),
        ("J. R. R.", False, False),
        ("He moved to the U.S.", True, True),
        ("Pens etc.", True, True),
        ("1.", False, False),
        ("Version 3.1", False, False),
        ("Well...", True, True),
        ("First line.\nSecond", False, False),
        ("First line\nSecond.", True, True),
        ("他走了。", True, True),
        ("他走了", False, False),
        ("他走了，", False, True),
        ("他走了……", False, True),
        ("“他走了……”", True, True),
        ("他说：“走吧。”", True, True),
        ("他说：“走吧", False, False),
        ("一、", False, False),
        ("他走了.", True, True),
        ("圆周率是3.", False, False),
        ("* * *\n", False, False),
        ("Done.\n* * *\n", True, True),
        ("He left\r", True, True),
        ("He left\u2028 ", True, True),
        ("He left\x85", True, True),
        ("वह गया।", True, True),
        ("Он ушёл. Т. е.", False, False),
    ],
)
def test_is_complete(text: str, sentence: bool, clause: bool) -> None:
    assert get_segmenter("sentence", "auto").is_complete(text) is sentence
    assert get_segmenter("clause", "auto").is_complete(text) is clause


def test_marks_alone_join_the_sentence_before() -> None:
    for segmenter in PAIRS:
        assert segmenter("One.\n* * *\n\n。。。\nTwo.") == ["One.\n* * *\n\n。。。", "\nTwo."]
        assert segmenter("* * *\n—\nOne.\nTwo.") == ["* * *\n—\nOne.", "\nTwo."]
        assert segmenter("One. !? (…)") == ["One. !? (…)"]
        assert segmenter("One!? ?! Two.") == ["One!? ?!", " Two."]
        assert segmenter("One two. — — — Three") == ["One two.", " — — — Three"]  # a row of a table


def test_auto_chooses_by_line() -> None:
    lines = [
        "Mr. Fox left. He ran.",
        "你好.世界.",
        "И т. д. и т. п. Он ушёл.",
        "Ok и. Ok",
        "안녕. 그는 갔다.",
    ]
    auto = get_segmenter("sentence", "auto")
    for line, language in zip(lines, ("en", "zh", "other", "en", "other"), strict=True):
        assert auto(line) == get_segmenter("sentence", language)(line)
    assert auto("\n".join(lines)) == [
        piece if index == 0 or at else "\n" + piece
        for index, line in enumerate(lines)
        for at, piece in enumerate(auto(line))
    ]


def test_languages_differ_only_beside_chinese() -> None:
    text = "你好,世界.走吧."
    assert get_segmenter("clause", "zh")(text) == ["你好,", "世界.", "走吧."]
    assert get_segmenter("clause", "en")(text) == [text]
    assert get_segmenter("clause", "auto")("a,b. C\n" + text) == ["a,b.", " C", "\n你好,", "世界.", "走吧."]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="clause, sentence"):
        get_segmenter("word", "en")
    with pytest.raises(UserError, match="de, el, en, .*auto"):
        get_segmenter("clause", "tlh")


def test_letters_before_an_abbreviation_make_no_thai_sentence() -> None:
    assert get_segmenter("sentence", "th")("เมื่อวาน พ.ศ. เมื่อวาน เมื่อวาน รัฐบาล") == [
        "เมื่อวาน พ.ศ. เมื่อวาน เมื่อวาน",
        " รัฐบาล",
    ]
