"""Lines of output."""

from __future__ import annotations

import pytest

from data_prep.common.errors import UserError, run_main, singular


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("1 sentences, 1 tokens in 1 windows", "1 sentence, 1 token in 1 window"),
        ("1 new tokens and 1 complete sentences", "1 new token and 1 complete sentence"),
        ("x: 1 processes, 1 shards with 1 documents", "x: 1 process, 1 shard with 1 document"),
        (
            "21 sentences, 1,001 tokens, 0.1 tokens, 11 runs",
            "21 sentences, 1,001 tokens, 0.1 tokens, 11 runs",
        ),
        ("41.1 tokens/s, 1 tokens/s", "41.1 tokens/s, 1 tokens/s"),
    ],
)
def test_one_of_a_thing_is_no_plural(line: str, printed: str) -> None:
    assert singular(line) == printed


def test_errors_are_singular_too(capsys: pytest.CaptureFixture) -> None:
    def refuse() -> None:
        raise UserError("the file has 1 documents")

    assert run_main("prog", refuse) == 2
    assert capsys.readouterr().err == "prog: error: the file has 1 document\n"
