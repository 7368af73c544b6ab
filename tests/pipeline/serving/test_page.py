"""The page in a real browser: Debian's chromium and its driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import tokenizer_folders
from helpers.model_folders import save_endless
from helpers.server import Serving, serving, wait_for

from pipeline.serving.app import Settings

pytestmark = [pytest.mark.long, pytest.mark.launch]
webdriver = pytest.importorskip("selenium.webdriver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("served")
    return save_endless(place / "tiny", tokenizer_folders.byte_level(place / "tokenizer"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and its driver are not installed (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    profile = tmp_path_factory.mktemp("profile")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser: Any, server: Serving):
        self.browser = browser
        browser.get(server.url)
        wait_for(lambda: self["model"].text == "tiny")

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element("id", name)

    def type(self, name: str, value: str) -> None:
        self[name].clear()
        self[name].send_keys(value)

    def ended(self) -> bool:
        return bool(self["status"].text) and self["go"].is_enabled()

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


def test_a_text_is_written_live(browser: Any, folder: str) -> None:
    with serving(folder, Settings(most_tokens=100_000)) as server:
        page = Page(browser, server)
        page.type("prompt", "The list is")
        page.type("tokens", "60")
        page.type("temperature", "0")
        page["go"].click()
        wait_for(page.ended)
        status = page["status"].text
        assert status.startswith("60 tokens in ") and status.endswith("tokens/s (length)")
        text = page["text"].text
        assert text.startswith("The list is") and len(text) > 60
        # Text appears while more is written, and Stop frees the row.
        page.type("tokens", "100000")
        page["go"].click()
        wait_for(lambda: len(page["text"].text) > 30)
        assert not page["go"].is_enabled() and server.batcher.generating == 1
        page["stop"].click()
        wait_for(page.ended)
        assert page["status"].text == "stopped"
        wait_for(lambda: server.batcher.generating == 0)
        # An error of the server is shown.
        page.type("tokens", "0")
        browser.execute_script("document.getElementById('tokens').removeAttribute('min')")
        page["go"].click()
        wait_for(page.ended)
        assert page["status"].text.startswith("max_tokens")
        assert not page["key"].is_displayed()
        # Nothing from elsewhere, and no violation of the policy: 400 above is the one message.
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert loaded and all(name.startswith(server.url) for name in loaded)
        assert [message for message in page.problems() if "status of 400" not in message] == []


def test_a_key_is_asked_for(browser: Any, folder: str) -> None:
    with serving(folder, Settings(key="right")) as server:
        page = Page(browser, server)
        wait_for(lambda: page["key"].is_displayed())
        for key, expected in (("wrong", "no valid API key"), ("right", "5 tokens in")):
            page.type("key", key)
            page.type("prompt", "x")
            page.type("tokens", "5")
            page["go"].click()
            wait_for(page.ended)
            assert page["status"].text.startswith(expected)


def test_what_a_model_writes_is_text(browser: Any, folder: str) -> None:
    with serving(folder) as server:
        page = Page(browser, server)
        prompt = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
        page.type("prompt", prompt)
        page.type("tokens", "3")
        page["go"].click()
        wait_for(page.ended)
        assert page["text"].text.startswith(prompt) and browser.title == "Sentence-level language model"
