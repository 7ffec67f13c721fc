"""Pages in a real Chromium, as wide as a phone and as a desk, for tests that look at what is drawn."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
NEEDS_CHROMIUM = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: `apt-get install chromium`, or name it by CHROMIUM"),
]
"""Marks of a module that opens pages."""
SIZES = {"wide": (1280, 860), "phone": (390, 780)}

_OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(node => {
  const box = node.getBoundingClientRect();
  if (box.right <= innerWidth + 1) return false;
  for (let of = node.parentElement; of; of = of.parentElement)  // what scrolls within its own box
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(of).overflowX)) return false;
  return true;
}).map(node => node.outerHTML.slice(0, 200))"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # as root in a container
        yield started
        started.close()


def opened(browser: Any, address: str, size: str) -> Any:
    """A tab with a page, which a phone lays out as phones do."""
    width, height = SIZES[size]
    phone = size == "phone"
    tab = browser.new_page(viewport={"width": width, "height": height}, is_mobile=phone, has_touch=phone)
    tab.goto(address)
    return tab


def assert_no_overflow(tab: Any, size: str) -> None:
    """Nothing makes the page wider than the screen; wide tables scroll within their own boxes."""
    assert tab.evaluate(_OUTSIDE) == []
    assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [SIZES[size][0]] * 2
