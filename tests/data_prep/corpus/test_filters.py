"""What is made of a record: its text, its language, what is changed in it, and why it is left out."""

from __future__ import annotations

import json
import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cli.commands import app
from data_prep.common.command_line import parse
from data_prep.common.errors import UserError
from data_prep.common.language import detect_language
from data_prep.common.language_codes import normal_language
from data_prep.corpus.filters import Filters, exam_text

EXAM = {
    "q_type": "单选题",
    "q_main": "下列哪个是质数？\n",
    "option_a": "4",
    "option_b": "7",
    "option_c": "9",
    "option_d": " ",
    "option_e": None,
    "std_ans": "B",
    "answer": "B",
    "answer_detail": "7只能被1和7整除。",
    "grade": "小学",
    "major": "数学",
    "keypoint": "质数",
}


@pytest.mark.parametrize(
    ("record", "rules", "text", "reason"),
    [
        ({"content": "a", "text": "b", "q_main": "c"}, {}, "a", None),
        ({"text": "b", "q_main": "c"}, {}, "b", None),
        ({"q_main": "c"}, {}, "c", None),
        ({"content": None, "text": "b"}, {}, "", "content is not text"),
        ({"q_main": 3}, {}, "", "content is not text"),
        ({"body": "d"}, {}, "", "no content"),
        ({"content": "a", "body": "d"}, {"text_field": "body"}, "d", None),
        ({"body": {"text": {"en": "e"}}}, {"text_field": "body.text.en"}, "e", None),
        ({"body.text": "f", "body": {"text": "g"}}, {"text_field": "body.text"}, "f", None),
        ({"body": ["text"]}, {"text_field": "body.text"}, "", "no content"),
        ({"content": "a"}, {"text_field": "body"}, "", "no content"),
        ({"body": ["x"]}, {"text_field": "body"}, "", "content is not text"),
    ],
)
def test_the_text_of_a_record(record: dict, rules: dict, text: str, reason: str | None):
    assert Filters(**rules).text_of(record) == (text, reason)


def test_exam_questions_become_text():
    assert exam_text(EXAM) == ("下列哪个是质数？\nA. 4\nB. 7\nC. 9\n答案：B\n解析：7只能被1和7整除。")
    assert exam_text(
        {"q_main": "Which one?", "option_b": 7, "answer": "7", "answer_detail": "See above."}
    ) == ("Which one?\nB. 7\nAnswer: 7\nExplanation: See above.")
    several = {"q_main": "哪些？", "std_ans": ["A", "C"], "answer": "甲和丙"}
    assert exam_text(several) == "哪些？\n答案：A, C\n解答：甲和丙"
    assert exam_text({"q_main": " "}) == ""


@pytest.mark.parametrize(
    ("rules", "text", "clean", "changed"),
    [
        ({}, "a\x00\r\n\n\n\n b  c\t\t", None, []),
        (
            {"strip_control": True},
            "a\x00b\x1b[0m\tc\nd\x7f\x9f",
            "ab[0m\tc\nd",
            ["control characters removed"],
        ),
        ({"strip_control": True}, "a\r\nb\rc\x0cd\x85e", "a\nb\nc\nd\ne", ["control characters removed"]),
        (
            {"strip_control": True},
            "a\u200b\ufeff\u2028b",
            None,
            [],
        ),  # formats and separators are not controls
        ({"white_space": True}, "a  b \t c\td \n\te\t\t\n", "a b c\td\n\te\n", ["white space"]),
        ({"white_space": True}, "a\r\n\r\n\r\n\r\nb\r\r\n ", "a\n\nb\n", ["white space"]),
        ({"white_space": True}, "a\n\nb c\n", None, []),
        ({"normal_form": "NFC"}, "e\u0301 ﬁ", "é ﬁ", ["normal form"]),
        ({"normal_form": "NFKC"}, "é ﬁ\u00a0！", "é fi !", ["normal form"]),
        (
            {"strip_control": True, "white_space": True, "normal_form": "NFKC"},
            "e\x00\u0301\u00a0 x",  # what stood between two characters is gone before they are joined
            "é x",
            ["control characters removed", "normal form", "white space"],
        ),
        ({"white_space": True, "strip_control": True, "normal_form": "NFC"}, "</s> <unk>", None, []),
    ],
)
def test_rules_that_change_bytes(rules: dict, text: str, clean: str | None, changed: list[str]):
    assert Filters(**rules).clean(text) == (text if clean is None else clean, changed)


ALL = Filters(strip_control=True, white_space=True, normal_form="NFKC")


@given(st.text(alphabet=st.sampled_from("ab \t\n\r\x00\x0c\x85\u00a0\u0301éﬁ\u3000"), max_size=12))
def test_a_clean_text_stays_as_it_is(text: str):
    clean, changed = ALL.clean(text)
    assert ALL.clean(clean) == (clean, []) and bool(changed) == (clean != text)
    assert unicodedata.is_normalized("NFKC", clean)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in clean)
    assert "  " not in clean and " \n" not in clean and "\n\n\n" not in clean


RECORD = {
    "toxic_score": 0.25,
    "word": "n/a",
    "count": "12",
    "date": "2021-03-01",
    "nothing": None,
    "flag": True,
    "meta": {"grade": "高中"},
    "nan": float("nan"),
    "list": [1],
}


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("toxic_score<0.5", None),
        (" toxic_score  <=  0.25 ", None),
        ("toxic_score<0.25", "filter: toxic_score<0.25"),
        ("toxic_score > 0.5", "filter: toxic_score>0.5"),
        ("toxic_score>=0.25", None),
        ("toxic_score==0.25", None),
        ("toxic_score!=0.25", "filter: toxic_score!=0.25"),
        ("score<1", "filter: no score"),
        ("nothing<1", "filter: no nothing"),
        ("word<1", "filter: word<1"),
        ("word>1", "filter: word>1"),
        ("word!=1", None),
        ("nan<1", "filter: nan<1"),
        ("nan>=1", "filter: nan>=1"),
        ("count>9", None),  # 12 as a number, not "12" < "9"
        ("date>=2021-01-01", None),
        ("date<2021-01-01", "filter: date<2021-01-01"),
        ("flag==true", None),
        ("flag==false", "filter: flag==false"),
        ("meta.grade==高中", None),
        ("meta.grade=='高 中'", "filter: meta.grade==高 中"),
        ("meta.level==1", "filter: no meta.level"),
        ("list==1", "filter: list==1"),
        ("word=='n/a'", None),
    ],
)
def test_filters(expression: str, reason: str | None):
    assert Filters(filters=(expression,)).refusal(RECORD, "text", "en") == reason


@pytest.mark.parametrize(
    "expression", ["", "toxic_score", "<0.5", "toxic_score<", "a=1", "a=<1", "a<<1", "a b<1"]
)
def test_bad_filters_are_refused_with_an_example(expression: str):
    with pytest.raises(UserError, match="write for example --filter 'toxic_score<0.5'"):
        Filters(filters=(expression,))


def test_lengths_and_languages():
    rules = Filters(min_chars=2, max_chars=3, keep_languages=("chinese", "EN-us"))
    assert rules.keep_languages == ("en", "zh")
    assert rules.refusal({}, "一", "zh") == "too short"
    assert rules.refusal({}, "一二", "zh") is rules.refusal({}, "abc", "en") is None
    assert rules.refusal({}, "abcd", "en") == "too long"
    assert rules.refusal({}, "abc", "fr") == "language: fr"


@pytest.mark.parametrize(
    "rules",
    [
        {"normal_form": "NFD"},
        {"min_chars": -1},
        {"min_chars": 5, "max_chars": 4},
        {"text_field": ""},
        {"keep_languages": ("?",)},
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules: dict):
    with pytest.raises(UserError):
        Filters(**rules)


def test_settings_tell_rules_apart_and_travel():
    assert json.loads(json.dumps(Filters().to_dict())) == Filters().to_dict()
    one = Filters(filters=("a < 1",), keep_languages=("zh", "en"))
    assert one == Filters(filters=("a<1",), keep_languages=("en", "zh", "zh"))
    assert one.to_dict() == pickle.loads(pickle.dumps(one)).to_dict() != Filters().to_dict()
    for rules in (one, Filters(), ALL):
        assert Filters.from_dict(json.loads(json.dumps(rules.to_dict()))) == rules
    assert pickle.loads(pickle.dumps(one)).refusal({"a": 2}, "x", "en") == "filter: a<1"
    assert Filters(normal_form="NFC").to_dict()["unicode"] == unicodedata.unidata_version


def test_arguments():
    def rules(*flags: str) -> Filters:
        needed = ["--input", "x", "--output", "y", "--tokenizer", "z"]
        return parse(app, ["shard", *needed, *flags]).keywords["rules"]

    assert rules() == Filters()
    flags = "--text-field a.b --filter x<1 --filter y>2 --strip-control --white-space --normal-form NFC"
    flags += " --min-chars 3 --max-chars 9 --keep-lang en zh"
    assert rules(*flags.split()) == Filters("a.b", ("x<1", "y>2"), True, True, "NFC", 3, 9, ("en", "zh"))


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("zh-CN", "zh"),
        ("zh_Hant_TW", "zh"),
        ("Chinese", "zh"),
        ("zho", "zh"),
        ("ENG", "en"),
        (" English ", "en"),
        ("en-GB", "en"),
        ("fr-CA", "fr"),
        ("French", "fr"),
        ("yue", "yue"),
        ("und", None),
        ("", None),
        ("Python", None),
        ("unknown", None),
        (None, None),
        (["en"], None),
    ],
)
def test_languages_by_name(label: object, code: str | None):
    assert normal_language(label) == code


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Plain words.", "en"),
        ("Déjà vu – naïve façade", "en"),
        ("这是中文 with words", "zh"),
        ("English with 中文", "en"),
        ("日本語の文章です。", "zh"),
        ("Это русский текст.", "other"),
        ("هذا نص عربي", "other"),
        ("यह हिन्दी है", "other"),
        ("한국어 문장입니다.", "other"),
        ("Русские words in an English text", "en"),
        ("12 + 3 = 15 …", "en"),
        ("", "en"),
        ("ascii " * 400 + "这是中文" * 900, "en"),  # the first characters decide
    ],
)
def test_languages_by_script(text: str, language: str):
    assert detect_language(text) == language
