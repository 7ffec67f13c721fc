"""The pages that the example scripts write, in a real Chromium as wide as a phone and as a desk."""

import json

import pytest

from browsing import NEEDS_CHROMIUM, SIZES, assert_no_overflow, chromium, opened
from mmeb_v2_data import write_v2
from unime_st.evaluation.mmeb.v2 import V2_META_TASKS

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def test_a_report_of_all_of_mmeb_v2_fits_a_phone(script, encoder, browser, tmp_path):
    """78 tasks in one command; every task is named, and wide tables scroll within their own boxes."""
    root = write_v2(tmp_path / "v2")
    output = script("evaluate").main(
        [
            str(encoder), "--mmeb-v2", str(root), "--num-frames", "4", "--max-pixels", "800",
            "--output", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"),
        ]
    )  # fmt: skip
    assert len(json.loads((output / "report.json").read_text())["sections"]) > 5
    for size in SIZES:
        tab = opened(browser, (output / "report.html").as_uri(), size)
        assert_no_overflow(tab, size)
        table = tab.locator("section", has=tab.get_by_role("heading", name="MMEB: by task", exact=True))
        assert table.locator("tbody tr td:first-child").all_inner_texts() == list(V2_META_TASKS)
        boxes = tab.locator(".scroll").evaluate_all("nodes => nodes.map(node => [node.scrollWidth, node.clientWidth])")
        assert size == "wide" or any(inner > outer for inner, outer in boxes)
        sizes = """nodes => Promise.all(nodes.map(async node => {
          node.loading = 'eager';
          await node.decode();
          return [node.naturalWidth, node.naturalHeight, node.clientWidth];
        }))"""
        pictures = tab.locator(".entry img").evaluate_all(sizes)
        strips = [shown for wide, high, shown in pictures if wide > 2 * high]
        assert strips  # frames of a video
        assert all(0 < shown <= SIZES[size][0] for shown in strips)
        tab.close()


def test_a_contact_sheet_fits_a_phone(script, world, encoder, browser, tmp_path):
    page = tmp_path / "found.html"
    script("encode_and_search").main(
        [str(encoder), str(world / "images"), "--text", "red" * 80, "--output", str(page), "--cache", str(tmp_path)]
    )
    for size in SIZES:
        tab = opened(browser, page.as_uri(), size)
        assert_no_overflow(tab, size)
        assert tab.locator("figure").count() > 1
        tab.close()
