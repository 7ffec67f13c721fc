"""``unime encode`` and ``unime serve`` with PDF files: a page is a row."""

import json
import shutil

import numpy as np
import pytest

from tiny import picture
from unime_st import load_encoder
from unime_st.cli import main
from unime_st.data import PdfPages, load_corpus
from unime_st.data.pdf_pages import PdfPage

pytest.importorskip("pypdfium2")

COLOURS = ("red", "green", "white", "yellow", "purple")


def write_pdf(path, colours):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [picture(colour, (144, 72)) for colour in colours]
    first.save(path, save_all=True, append_images=others, resolution=144)


@pytest.fixture
def papers(tmp_path):
    write_pdf(tmp_path / "papers" / "b.pdf", COLOURS[:3])
    write_pdf(tmp_path / "papers" / "sub" / "a.PDF", COLOURS[3:])
    (tmp_path / "papers" / "torn.pdf").write_text("no PDF")
    picture("red").save(tmp_path / "papers" / "cover.png")
    return tmp_path / "papers"


def encode(source, trained, output, *options):
    return main(["encode", str(source), str(trained / "encoder"), "--output", str(output), "--device", "cpu", *options])


def test_a_folder_of_pdfs(papers, trained, tmp_path, capsys, caplog):
    assert encode(papers, trained, tmp_path / "pages", "--pdfs", "--dpi", "72") == 0
    told = capsys.readouterr().out
    assert "1 damaged files or pages passed over, named above" in told
    assert "torn.pdf passed over" in caplog.text
    assert f"{tmp_path / 'pages'}: pages of" in told
    corpus = load_corpus(tmp_path / "pages")
    ids = ["b.pdf#page=1", "b.pdf#page=2", "b.pdf#page=3", "sub/a.PDF#page=1", "sub/a.PDF#page=2"]
    assert list(corpus.ids()) == ids
    model = load_encoder(trained / "encoder", device="cpu")
    shown = [{"image": page["image"].open()} for _, page in PdfPages(papers, dpi=72)]
    np.testing.assert_allclose(np.asarray(corpus), model.encode(shown), atol=1e-5)
    assert encode(papers, trained, tmp_path / "images", "--quiet") == 0  # without the option, its images
    assert list(load_corpus(tmp_path / "images").ids()) == ["cover.png"]


def test_a_killed_run_goes_on_page_by_page(papers, trained, tmp_path, monkeypatch):
    file, whole, output = papers / "b.pdf", tmp_path / "whole", tmp_path / "pages"
    assert encode(file, trained, whole, "--quiet", "--window-size", "1") == 0
    rendered = []
    plain = PdfPage.open

    def dying(page):
        rendered.append(page.number)
        if page.number == 3 and rendered.count(3) == 1:
            raise KeyboardInterrupt
        return plain(page)

    monkeypatch.setattr(PdfPage, "open", dying)
    assert encode(file, trained, output, "--quiet", "--window-size", "1") == 1
    assert len(list(output.glob("**/*.parquet"))) == 2
    rendered.clear()
    rendered.append(3)
    assert encode(file, trained, output, "--quiet", "--window-size", "1") == 0
    assert rendered[1] == 3
    assert np.array_equal(np.asarray(load_corpus(output)), np.asarray(load_corpus(whole)))
    assert [name.rpartition("/")[2] for name in load_corpus(output).ids()] == [f"b.pdf#page={n}" for n in (1, 2, 3)]


def test_options_that_do_not_go_together(papers, trained, tmp_path, capsys):
    output = tmp_path / "out"
    for options, told in (
        (["--pdfs", "--columns", "text"], "--columns is of tables and images, not of PDF files"),
        (["--dpi", "72"], "--dpi and --page-pixels are of PDF files"),
    ):
        assert encode(papers, trained, output, *options) == 2
        assert told in capsys.readouterr().err
    (papers / "cover.png").unlink()
    assert encode(papers, trained, output) == 1
    assert "Its PDF files are read by `PdfPages`, or with `--pdfs`" in capsys.readouterr().err
    shutil.rmtree(papers / "sub")
    (papers / "b.pdf").unlink()
    assert encode(papers, trained, output, "--pdfs") == 1
    assert "holds no page that can be read (torn.pdf: " in capsys.readouterr().err
    assert encode(papers / "none.pdf", trained, output) == 1
    assert "There is no PDF file" in capsys.readouterr().err
    assert encode(papers / "torn.pdf", trained, output, "--dpi", "0") == 1
    assert "dpi" in capsys.readouterr().err


def test_pages_are_shown_and_found(papers, trained, tmp_path, capsys):
    """The corpus is searched, and the rows of the page that serves it have thumbnails."""
    from starlette.testclient import TestClient

    from unime_st.search import CorpusSearch
    from unime_st.serve import create_app

    assert encode(papers, trained, tmp_path / "pages", "--pdfs", "--quiet") == 0
    capsys.readouterr()
    model = str(trained / "encoder")
    search = ["search", str(tmp_path / "pages"), "red", "--model", model, "--device", "cpu", "--json"]
    assert main([*search, "--id-prefix", "sub/"]) == 0
    hits = json.loads(capsys.readouterr().out)["results"]
    assert {hit["id"] for hit in hits} == {"sub/a.PDF#page=1", "sub/a.PDF#page=2"}
    corpus = load_corpus(tmp_path / "pages")
    app = create_app(load_encoder(model, device="cpu"), CorpusSearch(corpus), PdfPages(papers), name="m")
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/thumbnails/0").content[8:12] == b"WEBP"
        (papers / "b.pdf").write_text("torn since")
        assert client.get("/thumbnails/1").status_code == 404
