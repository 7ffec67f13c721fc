"""The site: it builds without a warning, loads nothing from elsewhere, and has every public name and formula."""

import functools
import http.server
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from browsing import CHROMIUM, SIZES, assert_no_overflow, opened

ROOT = Path(__file__).parents[2]
PARTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml", "docs", "examples", "model_cards", "src")
PUBLIC = ("losses", "samplers", "data", "training", "evaluation", "search", "serve", "modules")


def build(root, target):
    """Build the site of a checkout, as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target]
    given = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=given, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


class Loaded(HTMLParser):
    """What a browser fetches for a page before anybody clicks."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.found += [given[name] for name in ("src", "srcset", "poster", "data") if given.get(name)]
        if tag == "link":
            self.found.append(given["href"])
        if "mermaid" in (given.get("class") or "").split():
            self.found.append("https://the/theme/fetches/mermaid")
        self.found += re.findall(r"url\(([^)]*)\)", given.get("style") or "")


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded(page).found
        assert len(loaded) > 3
        outside = [link for link in loaded if re.match(r"(https?:)?//", link.strip("'\" "))]
        assert not outside, page
        gone = [link for link in loaded if "data:" not in link and not (page.parent / link.split("?")[0]).exists()]
        assert page.name == "404.html" or not gone, page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"@import|url\(['\"]?(?:https?:)?//[^)]*\)", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: `apt-get install chromium`, or name it by CHROMIUM")
def test_a_browser_asks_no_one_else_and_shows_formulas(site):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        asked, wrong = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        for name in ("index", "theory", "api/losses", "benchmarks/results/demo/report"):
            tab.goto(f"{address}{name}.html", wait_until="networkidle")
        tab.goto(f"{address}theory.html", wait_until="networkidle")
        fraction = tab.locator("mfrac").first
        above, below = (fraction.locator(f":scope > :nth-child({place})").bounding_box() for place in (1, 2))
        assert above["y"] + above["height"] <= below["y"] + 2  # laid out, not words in a row
        tab.fill("input.md-search__input", "HardNegativeInfoNCELoss")
        tab.wait_for_selector(".md-search-result__item")  # the search works too
        for name in ("index", "theory", "encode", "evaluate", "benchmarks/results/demo/report"):
            for size in SIZES:
                shown = opened(browser, f"{address}{name}.html", size)
                assert_no_overflow(shown, size)
                shown.close()
        browser.close()
        server.shutdown()
    assert len(asked) > 20
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not wrong


def test_every_public_name_is_in_the_reference(site):
    names = {"unime_st": importlib.import_module("unime_st").__all__}
    names |= {f"unime_st.{name}": importlib.import_module(f"unime_st.{name}").__all__ for name in PUBLIC}
    shown = {
        found for page in site.glob("api/*.html") for found in re.findall(r'id="(unime_st[^"]*)"', page.read_text())
    }
    missing = {f"{module}.{name}" for module, own in names.items() for name in own if name != "__version__"} - shown
    assert not missing
    assert "unime_st.functional.info_nce" in shown


def test_docstrings_are_shown_as_they_are_meant(site):
    text = (site / "api" / "losses.html").read_text(encoding="utf-8")
    assert not re.search(r":(func|class|meth|mod|data):`", re.sub(r"<[^>]+>", "", text))
    assert "+----" in text[text.index("<pre") :]  # tables of characters keep their lines
    for page in site.glob("api/*.html"):
        prose = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert "&gt;&gt;&gt;" not in prose, page
        assert "+---" not in prose, page


def test_formulas_are_mathml(site):
    source = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    page = (site / "theory.html").read_text(encoding="utf-8")
    assert page.count("<math ") == source.count("```math") > 3
    assert r"\frac" not in page


def test_every_page_is_in_the_navigation(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in start, page
    for page in (ROOT / "docs").glob("notebooks/*.ipynb"):
        assert f'href="notebooks/{page.stem}.html"' in start, page
        assert (site / "notebooks" / page.name).is_file()


@pytest.fixture
def checkout(tmp_path):
    """A copy to break."""
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_links_that_lead_nowhere_fail_the_build(checkout):
    broken = [
        ("docs/encode.md", "nowhere.md"),
        ("docs/encode.md", "search.md#no-such-part"),
        ("docs/encode.md", "../benchmarks/results/none.json"),
        ("README.md", "docs/search.md#no-part-either"),
    ]
    for page, link in broken:
        with (checkout / page).open("a", encoding="utf-8") as file:
            file.write(f"\n[there]({link})\n")
    done = build(checkout, checkout / "site")
    assert done.returncode == 1
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("WARNING")]
    assert len(warnings) == len(broken)
    for _, link in broken:
        assert any(link.rpartition("/")[2] in line for line in warnings), link
