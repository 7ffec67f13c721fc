"""PDF files as a corpus: pages rendered late, resumed, and passed over where they are damaged."""

import re

import numpy as np
import pytest
from PIL import Image

from tiny import picture
from unime_st import build_encoder
from unime_st.data import PdfPages, encode_corpus, load_corpus, pdf_pages
from unime_st.data.pdf_pages import PdfPage
from unime_st.identity.content import content_id
from unime_st.images import UnreadableImageError

pytest.importorskip("pypdfium2")

COLOURS = ("red", "green", "white", "yellow", "purple")


def write_pdf(path, colours):
    """A file of a page for each colour, of 72 x 36 points."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [picture(colour, (144, 72)) for colour in colours]
    first.save(path, save_all=True, append_images=others, resolution=144)
    return path


@pytest.fixture
def folder(tmp_path):
    write_pdf(tmp_path / "papers/b.pdf", COLOURS[:3])
    write_pdf(tmp_path / "papers/sub/a.PDF", COLOURS[3:])
    (tmp_path / "papers/notes.txt").write_text("no PDF")
    return tmp_path / "papers"


@pytest.fixture
def opened(monkeypatch):
    """The pages that are rendered."""
    seen = []
    plain = PdfPage.open
    monkeypatch.setattr(PdfPage, "open", lambda page: seen.append(page.number) or plain(page))
    return seen


class Means:
    """Embeds an image by its mean colour, like any model that takes PIL images."""

    def __init__(self, stop_after=None):
        self.stop_after, self.rows = stop_after, 0

    def encode(self, items, **options):
        if self.stop_after is not None and self.rows >= self.stop_after:
            raise KeyboardInterrupt
        self.rows += len(items)
        return np.stack([np.asarray(item["image"]).mean(axis=(0, 1)) for item in items])


def test_ids_files_and_pages(folder):
    pages = PdfPages(folder)
    ids = ["b.pdf#page=1", "b.pdf#page=2", "b.pdf#page=3", "sub/a.PDF#page=1", "sub/a.PDF#page=2"]
    assert [name for name, _ in pages] == ids
    assert [name for name, _ in pages[3:]] == ids[3:]
    assert (len(pages), pages[-1][0]) == (5, ids[-1])
    for colour, (_, item) in zip(COLOURS, pages, strict=True):
        image = item["image"].open()
        assert (image.size, image.mode) == ((144, 72), "RGB")
        assert np.abs(np.asarray(image, int) - np.asarray(picture(colour, (144, 72)), int)).mean() < 3
    one = str(folder / "b.pdf")
    assert [name for name, _ in PdfPages(one)] == [f"{one}#page={number}" for number in (1, 2, 3)]
    assert len(PdfPages([one, folder / "sub/a.PDF"])) == 5


def test_resolution(folder):
    assert PdfPages(folder, dpi=72)[0][1]["image"].open().size == (72, 36)
    small = PdfPages(folder, dpi=300, max_pixels=5000)[0][1]["image"].open()
    assert small.width * small.height <= 5300  # sides are whole
    assert small.width == pytest.approx(2 * small.height, abs=2)
    for wrong in ({"dpi": 0}, {"max_pixels": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PdfPages(folder, **wrong)


def test_a_page_is_known_without_being_rendered(folder, opened):
    pages = PdfPages(folder)
    ids = [content_id(item) for _, item in pages]
    assert len(set(ids)) == 5
    copy = write_pdf(folder.parent / "copy.pdf", COLOURS[:3])
    copy.write_bytes((folder / "b.pdf").read_bytes())
    assert [content_id(item) for _, item in PdfPages(copy)] == ids[:3]
    assert content_id(PdfPages(folder, dpi=72)[0][1]) != ids[0]
    assert opened == []


def test_a_corpus_goes_on_page_by_page(folder, tmp_path, opened):
    options = {"with_ids": True, "window_size": 1, "model_name": "means", "prefetch": False}
    with pytest.raises(KeyboardInterrupt):
        encode_corpus(Means(stop_after=2), PdfPages(folder), tmp_path / "corpus", **options)
    assert opened == [1, 2, 3]  # the third was rendered, not written
    opened.clear()
    corpus = encode_corpus(Means(), PdfPages(folder), tmp_path / "corpus", **options)
    assert opened == [3, 1, 2]  # those before are not rendered again
    assert [list(load_corpus(tmp_path / "corpus").ids())[row] for row in (0, 4)] == ["b.pdf#page=1", "sub/a.PDF#page=2"]
    whole = encode_corpus(Means(), PdfPages(folder), tmp_path / "other", **options)
    assert np.array_equal(np.asarray(corpus), np.asarray(whole))
    opened.clear()
    encode_corpus(Means(), PdfPages(folder), tmp_path / "corpus", **options)
    assert opened == []


def test_our_encoder_sees_the_page(folder, tmp_path, backbone):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    pages = PdfPages(folder)
    corpus = encode_corpus(model, pages, tmp_path / "corpus", with_ids=True, batch_size=2)
    expected = model.encode([{"image": item["image"].open()} for _, item in pages])
    np.testing.assert_allclose(np.asarray(corpus), expected, atol=1e-6)
    bare = model.encode([item["image"] for _, item in pages])
    np.testing.assert_allclose(bare, expected, atol=1e-6)


def test_damaged_files_are_passed_over_and_told(folder, caplog):
    (folder / "a_torn.pdf").write_bytes((folder / "b.pdf").read_bytes()[:200])
    (folder / "c_text.pdf").write_text("this is no PDF")
    pages = PdfPages(folder)
    assert len(pages) == 5
    assert sorted(pages.damaged) == ["a_torn.pdf", "c_text.pdf"]
    assert "c_text.pdf passed over" in caplog.text
    with pytest.raises(ValueError, match=r"holds no page that can be read \(.*c_text\.pdf"):
        PdfPages(folder / "c_text.pdf")
    with pytest.raises(FileNotFoundError, match=r"none\.pdf"):
        PdfPages(folder / "none.pdf")
    (folder.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"there is no \.pdf file"):
        PdfPages(folder.parent / "empty")


def test_a_damaged_page_is_passed_over_and_told(folder):
    file = folder / "b.pdf"
    data = file.read_bytes()
    kids = re.search(rb"/Kids \[.*?\]", data)[0]
    second = re.findall(rb"\d+ 0 R", kids)[1]
    file.write_bytes(data.replace(kids, kids.replace(second, b"0 0 R".rjust(len(second), b"0"))))
    pages = PdfPages(folder)
    assert [name for name, _ in pages][:2] == ["b.pdf#page=1", "b.pdf#page=3"]
    assert pages.damaged.keys() == {"b.pdf#page=2"}
    assert np.asarray(pages[1][1]["image"].open()).mean() > np.asarray(pages[0][1]["image"].open()).mean()  # white


def test_a_page_that_is_gone_is_named(folder, tmp_path, backbone):
    pages = PdfPages(folder)
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    write_pdf(folder / "b.pdf", COLOURS[:1])  # two pages fewer than were counted
    with pytest.raises(UnreadableImageError, match=r"Cannot render page 3 of .*b\.pdf"):
        pages[2][1]["image"].open()
    with pytest.raises(ValueError, match=r"row 1.*page 2 of .*b\.pdf"):
        encode_corpus(model, pages, tmp_path / "corpus", with_ids=True)


def test_pages_are_pil_images(folder):
    assert isinstance(PdfPages(folder)[0][1]["image"].open(), Image.Image)


def drawn_pdf(path, boxes, trailer=""):
    """A file of empty pages of these sides in points."""
    kids = " ".join(f"{number + 3} 0 R" for number in range(len(boxes)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(boxes)} >>"]
    objects += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] >>" for width, height in boxes]
    objects.append(f"<< /Filter /Standard /V 1 /R 2 /O <{'41' * 32}> /U <{'42' * 32}> /P -4 >>")
    text, places = "%PDF-1.4\n", []
    for number, written in enumerate(objects, 1):
        places.append(len(text))
        text += f"{number} 0 obj\n{written}\nendobj\n"
    start = len(text)
    text += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n" + "".join(f"{at:010} 00000 n \n" for at in places)
    text += f"trailer << /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{start}\n%%EOF"
    path.write_text(text)
    return path


def test_pages_that_cannot_be_rendered_are_passed_over_and_told(tmp_path):
    """They load, but as a line of a million pixels, or as more than memory holds."""
    file = drawn_pdf(tmp_path / "a.pdf", [(72, 72), (1_000_000_000, 1), (14_400, 14_400)])
    pages = PdfPages(tmp_path)
    assert [name for name, _ in pages] == ["a.pdf#page=1", "a.pdf#page=3"]
    assert "a side is longer than 65535" in pages.damaged["a.pdf#page=2"]
    sizes = [item["image"].open().size for _, item in pages]
    assert sizes == [(144, 144), (1415, 1415)]
    whole = PdfPages(tmp_path, max_pixels=None)
    assert [name for name, _ in whole] == ["a.pdf#page=1"]
    assert "decompression bomb" in whole.damaged["a.pdf#page=3"]
    with pytest.raises(UnreadableImageError, match=r"Cannot render page 3 of .*a\.pdf: .*decompression bomb"):
        PdfPage(str(file), 3, 144, None).open()


@pytest.mark.parametrize("good", [0, 2])
def test_a_file_that_lies_about_its_pages_is_given_up(tmp_path, monkeypatch, good, caplog):
    """A million of them, about the most that pdfium believes in."""
    file = drawn_pdf(tmp_path / "lies.pdf", [(72, 72)] * max(1, good))
    file.write_text(file.read_text().replace(f"/Count {max(1, good)} ", "/Count 1000000 "))
    if not good:
        file.write_text(file.read_text().replace("/Kids [3 0 R]", "/Kids [9 0 R]"))
    drawn_pdf(tmp_path / "other.pdf", [(72, 72)] * 3)
    looked = []
    plain = pdf_pages._scale
    monkeypatch.setattr(pdf_pages, "_scale", lambda *given: looked.append(given) or plain(*given))
    pages = PdfPages(tmp_path)
    assert [name for name in pages.ids if name.startswith("lies")] == [f"lies.pdf#page={n + 1}" for n in range(good)]
    assert [name for name in pages.ids if name.startswith("other")] == [f"other.pdf#page={n}" for n in (1, 2, 3)]
    (place,) = pages.damaged
    assert place == f"lies.pdf#page={good + 1}"
    assert "nor can the next 99 pages be read, of 1000000 that the file claims to have" in pages.damaged[place]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert len(looked) == good + 3
    monkeypatch.setattr(pdf_pages, "_MOST_FAILED", 3)
    assert "nor can the next 2 pages" in next(iter(PdfPages(tmp_path).damaged.values()))


def test_a_small_file_that_names_one_page_a_million_times_is_passed_over(tmp_path):
    file = tmp_path / "tree.pdf"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    for depth in range(6):
        kids = f"{depth + 3} 0 R " * 10
        objects.append(f"<< /Type /Pages /Count {10 ** (6 - depth)} /Kids [{kids}] >>")
    objects.append("<< /Type /Page /MediaBox [0 0 72 72] >>")
    text = "%PDF-1.4\n" + "".join(f"{number} 0 obj\n{one}\nendobj\n" for number, one in enumerate(objects, 1))
    file.write_text(f"{text}trailer << /Root 1 0 R >>\n")
    drawn_pdf(tmp_path / "other.pdf", [(72, 72)])
    pages = PdfPages(tmp_path)
    assert pages.ids == ["other.pdf#page=1"]
    assert pages.damaged == {"tree.pdf": f"it claims to have 1000000 pages in {file.stat().st_size} bytes"}


def test_a_file_that_claims_more_pages_than_can_be_is_read_as_it_is(tmp_path):
    file = drawn_pdf(tmp_path / "lies.pdf", [(72, 72)] * 2)
    file.write_text(file.read_text().replace("/Count 2 ", "/Count 30000000 "))
    pages = PdfPages(file)
    assert len(pages) == 2
    assert not pages.damaged


def test_a_file_goes_on_behind_fewer_damaged_pages(tmp_path):
    file = drawn_pdf(tmp_path / "a.pdf", [(72, 72)] * 200)
    text = file.read_text()
    for number in range(50, 149):
        text = text.replace(f" {number} 0 R", " 0 0 R".rjust(len(f" {number} 0 R")), 1)
    file.write_text(text)
    pages = PdfPages(tmp_path)
    assert len(pages) == 101
    assert len(pages.damaged) == 99


def test_encrypted_files_and_folders_named_like_files(tmp_path):
    drawn_pdf(tmp_path / "a.pdf", [(72, 72)])
    drawn_pdf(tmp_path / "b.pdf", [(72, 72)], "/Encrypt 4 0 R /ID [<41> <41>]")
    (tmp_path / "c.pdf").mkdir()
    pages = PdfPages(tmp_path)
    assert ([name for name, _ in pages], list(pages.damaged)) == (["a.pdf#page=1"], ["b.pdf"])
    assert "password" in pages.damaged["b.pdf"]
