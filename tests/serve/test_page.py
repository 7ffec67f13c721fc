"""The page in a real Chromium: what people do with it, at two widths, and that it asks nobody else.

Screenshots are kept in the folder that UNIME_SCREENSHOTS names, or in the test's temporary one.
"""

import os
import re
import time
from pathlib import Path

import pytest
from live import running
from playwright.sync_api import expect
from serve_data import TOKEN, drawing, file_of

from browsing import NEEDS_CHROMIUM, SIZES, chromium
from unime_st.serve import create_app

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def addresses(make_app, world):
    class Empty:
        corpus = type("NoRows", (), {"manifest": {"with_ids": False}, "__len__": lambda self: 0})()

    with (
        running(make_app("images")) as images,
        running(make_app("texts")) as texts,
        running(create_app(world.model, Empty())) as empty,
        running(make_app("images", token=TOKEN)) as guarded,
    ):
        yield {"images": images, "texts": texts, "empty": empty, "guarded": guarded}


class Page:
    """A tab, all that it asked for, and all that its console said."""

    def __init__(self, tab, address, shots):
        self.tab, self.address, self.shots = tab, address, shots
        self.asked, self.said = [], []
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.on("console", lambda message: self.said.append(message.text))
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}") or dialog.dismiss())
        tab.goto(address)

    def hits(self):
        expect(self.tab.locator("body.busy")).to_have_count(0)
        self.tab.wait_for_selector(".hit .score")
        return self.tab.locator(".hit")

    def search(self, text):
        self.tab.fill("#text", text)
        with self.tab.expect_response("**/search"):
            self.tab.keyboard.press("Enter")
        return self.hits()

    def shoot(self, name):
        self.tab.wait_for_timeout(400)  # pictures fade in
        self.tab.screenshot(path=self.shots / f"{name}.png")

    def says(self, words):
        expect(self.tab.locator("#status")).to_have_text(re.compile(words))

    def waits_for(self, condition):
        """Ask from outside: the page's policy forbids Playwright's own waiting, which evaluates a string within."""
        end = time.monotonic() + 30
        while not self.tab.evaluate(condition):
            assert time.monotonic() < end, condition
            self.tab.wait_for_timeout(50)

    def complains(self, words):
        expect(self.tab.locator("#error")).to_be_visible()
        expect(self.tab.locator("#error")).to_contain_text(words)


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.fixture
def open_page(browser, addresses, size, tmp_path):
    shots = Path(os.environ.get("UNIME_SCREENSHOTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    pages = []

    def open_one(kind, scheme="light"):
        width, height = SIZES[size]
        phone = size == "phone"
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=phone, is_mobile=phone
        )
        pages.append(Page(context.new_page(), addresses[kind], shots))
        return pages[-1]

    yield open_one
    for page in pages:
        assert [url for url in page.asked if not url.startswith((page.address, "data:"))] == []
        assert len([url for url in page.asked if url.startswith(page.address)]) >= 4
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        page.tab.context.close()


def test_search_by_text_and_more_like_this(open_page, size, world):
    page = open_page("images")
    page.says("^30 rows. Type")
    page.shoot(f"{size}-start")
    hits = page.search("a red bus")
    assert hits.count() == 24
    page.says(r"^24 of 30 rows, \d+ ms$")
    scores = [float(text) for text in page.tab.locator(".score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.waits_for("[...document.querySelectorAll('.frame img')].slice(0, 2).every((one) => one.naturalWidth > 0)")
    page.shoot(f"{size}-text")
    third = page.tab.locator(".hit .id").nth(2).inner_text()
    with page.tab.expect_response("**/search"):
        hits.nth(2).click()
    page.hits()
    assert page.tab.locator(".hit .id").first.inner_text() == third
    page.says(f"^More like {third}: 24 of 30 rows")
    with page.tab.expect_response("**/search"):
        page.tab.go_back()
    page.hits()
    assert page.tab.input_value("#text") == "a red bus"
    page.tab.click("#more")
    expect(page.tab.locator(".hit")).to_have_count(30)
    assert page.said == []


def test_search_by_image_and_both(open_page, size, world):
    page = open_page("images", "dark")
    page.tab.wait_for_selector(".hit")
    picture = {"name": "mine.png", "mimeType": "image/png", "buffer": file_of(drawing(7))}
    with page.tab.expect_response("**/search"):
        page.tab.set_input_files("#file", picture)
    page.hits()
    assert page.tab.locator(".hit .id").first.inner_text() == "b_7.png"
    assert page.tab.is_visible("#preview")
    page.shoot(f"{size}-dark-image")
    page.tab.click("summary")
    page.tab.fill("#instruction", "In one word:")
    page.tab.fill("#prefix", "a_")
    with page.tab.expect_request("**/search") as sent:
        page.search("in blue")
    asked = sent.value.post_data_json
    assert asked["image"].startswith("data:image/png;base64,")
    assert {**asked, "image": None} == {
        "text": "in blue", "image": None, "instruction": "In one word:", "prefix": "a_", "k": 24,
    }  # fmt: skip
    assert all(name.startswith("a_") for name in page.tab.locator(".hit .id").all_inner_texts())
    page.shoot(f"{size}-dark-both")
    page.tab.click("#unpick")
    assert not page.tab.is_visible("#preview")
    assert page.said == []


def test_an_image_is_pasted_and_dropped(open_page):
    page = open_page("images")
    page.tab.wait_for_selector(".hit")
    for event, place in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        content = list(file_of(drawing(7 if event == "paste" else 9)))
        with page.tab.expect_response("**/search"):
            page.tab.evaluate(
                """([event, place, content]) => {
                    const data = new DataTransfer();
                    data.items.add(new File([new Uint8Array(content)], "a.png", {type: "image/png"}));
                    const made = event === "paste" ? new ClipboardEvent(event, {clipboardData: data, bubbles: true})
                        : new DragEvent(event, {dataTransfer: data, bubbles: true, cancelable: true});
                    document.body.dispatchEvent(made);
                }""",
                [event, place, content],
            )
        page.hits()
        wanted = "b_7.png" if event == "paste" else "b_9.png"
        assert page.tab.locator(".hit .id").first.inner_text() == wanted
    assert page.said == []


def test_the_keyboard_is_enough(open_page, size):
    page = open_page("images")
    page.tab.wait_for_selector(".hit")
    focused = "document.activeElement.id || document.activeElement.className"
    page.tab.keyboard.press("/")
    assert page.tab.evaluate(focused) == "text"
    assert page.tab.input_value("#text") == ""
    page.search("a/b")
    assert page.tab.input_value("#text") == "a/b"
    place = "[...document.querySelectorAll('.hit')].indexOf(document.activeElement)"
    columns = page.tab.evaluate(
        "getComputedStyle(document.getElementById('results')).gridTemplateColumns.split(' ').length"
    )
    for key, wanted in (
        ("ArrowDown", 0),
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
    ):
        page.tab.keyboard.press(key)
        assert page.tab.evaluate(place) == wanted
    assert page.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    name = page.tab.locator(".hit .id").first.inner_text()
    with page.tab.expect_response("**/search"):
        page.tab.keyboard.press("Enter")
    page.hits()
    page.says(f"^More like {name}")
    page.tab.keyboard.press("Escape")
    assert page.tab.evaluate(focused) == "text"
    assert page.said == []


def test_what_is_wrong_is_said_in_words(open_page, size):
    page = open_page("images")
    page.tab.wait_for_selector(".hit")
    for content, words in (
        (b"no image", "is not an image that can be read"),
        (file_of(drawing(1, (300, 300)))[:500], "is damaged"),
    ):
        with page.tab.expect_response("**/search"):
            page.tab.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": content})
        page.complains(words)
    page.shoot(f"{size}-broken")
    page.tab.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": bytes(16 * 2**20)})
    page.complains("16.0 MiB; at most 15")
    page.tab.click("#unpick")
    page.tab.click("summary")
    page.tab.fill("#prefix", "zzz")
    page.tab.fill("#text", "a bus")
    with page.tab.expect_response("**/search"):
        page.tab.keyboard.press("Enter")
    page.says("^No id begins with “zzz”: nothing was found")
    assert not page.tab.is_visible("#error")
    page.shoot(f"{size}-nothing")
    assert all("Failed to load resource" in said for said in page.said)
    assert len(page.said) == 2  # the two answers above that are errors


def test_an_empty_corpus_says_so(open_page, size):
    page = open_page("empty")
    page.says("^This corpus is empty")
    page.tab.fill("#text", "a bus")
    with page.tab.expect_response("**/search"):
        page.tab.keyboard.press("Enter")
    page.says("there is nothing to find yet")
    page.shoot(f"{size}-empty")
    assert page.said == []


def test_texts_of_strangers_stay_texts(open_page, size, world):
    page = open_page("texts")
    page.tab.wait_for_selector(".hit")
    hits = page.search("<script>alert(1)</script>")
    page.tab.click("#more")
    expect(page.tab.locator(".hit")).to_have_count(30)
    shown = page.tab.eval_on_selector_all(".hit .words", "all => all.map((one) => one.textContent)")
    assert sorted(shown) == sorted(world.texts)
    assert hits.locator("img").count() == page.tab.locator("#results script").count() == 0
    assert page.tab.title() == "<script>alert(1)</script> – Search"
    page.shoot(f"{size}-texts")
    page.tab.goto(f"{page.address}/?q=<img src=x onerror=alert(2)>")
    page.hits()
    assert page.tab.input_value("#text") == "<img src=x onerror=alert(2)>"
    page.tab.goto(f"{page.address}/?like=99999")
    page.complains("There is no row 99999")
    assert [said for said in page.said if "404" not in said] == []


def test_the_token_is_asked_for(open_page, size):
    page = open_page("guarded")
    page.shoot(f"{size}-token")
    expect(page.tab.locator("#token")).to_be_focused()
    page.tab.fill("#token", "a guess")
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_selector("text=That is not the token")
    expect(page.tab.locator("#token")).to_be_focused()
    page.tab.fill("#token", TOKEN)
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_selector(".frame img")
    page.search("a bus")
    assert [said for said in page.said if "401" not in said] == []
