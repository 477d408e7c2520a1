"""The page in a real browser: a prompt is typed, two models answer side by side, and nothing leaves this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.trainer.serving.conftest import serving

from fttrain.serving.worker import Worker
from fttrain.tools.chat import say

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def port(loaded: tuple[Any, Any]) -> Iterator[int]:
    """Two models of the same weights."""
    yield from serving({name: Worker(name, *loaded, batch_size=8, most_waiting=64) for name in ("tuned", "base")})


@pytest.fixture(params=["desk", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, port: int) -> Iterator[Page]:
    """The page as it opens: on a desk in light colours, on a phone in dark ones; its requests are all to the server."""
    phone = request.param == "phone"
    made = browser.new_page(viewport=PHONE if phone else DESK, color_scheme="dark" if phone else "light")
    asked: list[str] = []
    faults: list[str] = []
    made.on("request", lambda sent: asked.append(sent.url))
    made.on("pageerror", lambda error: faults.append(str(error)))
    made.goto(f"http://127.0.0.1:{port}/")
    yield made
    made.close()
    assert asked
    assert not faults
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked)


def test_a_typed_prompt_is_answered_by_both_models(page: Page, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    page.fill("#max_tokens", "9")
    page.click("#prompt")
    page.keyboard.type("<b>red</b>")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#models .soft")).to_have_count(2)
    page.screenshot(path=tmp_path / "page.png")
    assert page.locator("#models h2").all_text_contents() == ["tuned", "base"]
    asked = page.locator("#models .user").all_text_contents()
    assert asked == ["<b>red</b>"] * 2
    assert page.locator("#models b").count() == 0
    answers = page.locator("#models .turn:not(.user)").all_text_contents()
    assert [answer.strip() for answer in answers] == [say(*loaded, [{"role": "user", "content": "<b>red</b>"}], 9)] * 2
    width, shown = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= shown
    assert page.locator("#models .error").count() == 0


def test_what_is_refused_is_shown_and_the_next_prompt_answered(page: Page) -> None:
    page.fill("#max_tokens", "99")
    page.fill("#prompt", "red")
    page.click("#ask")
    expect(page.locator("#models .error")).to_have_count(2)
    assert "max_tokens may be 16 at most" in page.locator("#models .error").first.inner_text()
    page.click("#forget")
    page.fill("#max_tokens", "4")
    page.fill("#prompt", "red")
    page.click("#ask")
    expect(page.locator("#models .soft")).to_have_count(2)
    assert page.locator("#models .error").count() == 0


def test_the_settings_stand_in_one_line(page: Page) -> None:
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("temperature", "top_p", "max_tokens")]
    assert len({round(box["y"]) for box in boxes if box}) == 1
