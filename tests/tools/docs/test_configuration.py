"""docs/configuration.md says what the schema says."""

from tools.docs.configuration import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tools.docs.configuration"
