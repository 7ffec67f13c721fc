import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emoji import benchmark
from emoji.benchmark import build_benchmark, concepts_of
from emoji.concepts import SPLITS
from emoji.images import on_white, write_collage
from emoji.texts import split_glosses, wordnet_glosses


def quiet(line):
    pass


def test_rows_have_the_layout_of_mmeb(benchmark_folder):
    bench = benchmark_folder
    subsets = sorted(path.name for path in bench.train_root.iterdir())
    assert subsets == sorted([*bench.meta_tasks, "EmojiCaption"])
    for subset in subsets:
        table = pq.read_table(bench.train_root / subset / "original-00000-of-00001.parquet")
        columns = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
        assert table.column_names == columns
        assert table.num_rows == bench.info["train"][subset]
        for row in table.to_pylist():
            assert (row["pos_text"], row["pos_image_path"]) != (row["neg_text"], row["neg_image_path"])
    for task in bench.meta_tasks:
        table = pq.read_table(bench.eval_root("test", "heldout") / task / "test-00000-of-00001.parquet")
        assert table.column_names == ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
        assert all(len(row["tgt_text"]) == len(row["tgt_img_path"]) > 1 for row in table.to_pylist())


def _images_named(bench, split):
    named = set()
    if split == "train":
        for path in bench.train_root.rglob("*.parquet"):
            for row in pq.read_table(path).to_pylist():
                named |= {row["qry_image_path"], row["pos_image_path"], row["neg_image_path"]}
    else:
        for path in (bench.root / "eval" / split).rglob("*.parquet"):
            for row in pq.read_table(path).to_pylist():
                named |= {row["qry_img_path"], *row["tgt_img_path"]}
        for path in (bench.root / "swaps" / split).rglob("*.json"):
            named |= {row["filename"] for row in json.loads(path.read_text()).values()}
    for path in (bench.root / "retrieval").glob(f"{split}-*.json"):
        named |= {row["image"] for row in json.loads(path.read_text())}
    return named - {""}


def test_every_image_named_is_there_and_no_concept_leaks(benchmark_folder, fake):
    named = {split: _images_named(benchmark_folder, split) for split in SPLITS}
    assert all(named.values())
    for split in SPLITS:
        assert all((benchmark_folder.image_root / image).is_file() for image in named[split])
    assert len(set.union(*named.values())) == sum(map(len, named.values()))
    assert not any(image.startswith("fluent/") for image in named["train"])
    allowed = {
        split: {concept.code.lower() for concept in concepts}
        for split, concepts in concepts_of(fake, benchmark_folder).items()
    }
    for split in SPLITS:
        codes = {
            image.split("/")[1].split("-tone")[0].removesuffix(".png")
            for image in named[split]
            if "collage" not in image
        }
        assert codes <= allowed[split]


def test_images_are_white_where_they_were_transparent(benchmark_folder):
    images, _ = benchmark_folder.retrieval("test", "fluent")
    with Image.open(images[0]) as image:
        assert image.mode == "RGB"
        assert image.size == (160, 160)
        assert image.getpixel((2, 2)) == (255, 255, 255)


def test_retrieval_lists_agree_between_vendors(benchmark_folder):
    images, captions = benchmark_folder.retrieval("test", "google")
    others, same = benchmark_folder.retrieval("test", "fluent")
    assert captions == same
    assert [path.name for path in images] == [path.name for path in others]
    with pytest.raises(FileNotFoundError, match="check split, vendor"):
        benchmark_folder.retrieval("train", "fluent")


def test_stage_one_texts_hold_nothing_of_the_test(benchmark_folder, fake):
    concepts = concepts_of(fake, benchmark_folder)
    captions = set(benchmark_folder.captions())
    assert {concept.label for concept in concepts["train"]} <= captions
    assert not captions & {concept.label for split in SPLITS[1:] for concept in concepts[split]}
    terms = [{gloss.term for gloss in benchmark_folder.glosses(split)} for split in SPLITS]
    assert [len(part) for part in terms[1:]] == [500, 500]
    assert len(set.union(*terms)) == sum(map(len, terms))


def test_a_second_build_is_the_same_and_a_repeated_one_does_nothing(benchmark_folder, fake, tmp_path):
    again = build_benchmark(fake, tmp_path / "again", eval_rows=20, report=quiet)
    files = sorted(path.relative_to(again.root) for path in again.root.rglob("*") if path.is_file())
    assert len(files) > 100
    for name in files:
        assert (again.root / name).read_bytes() == (benchmark_folder.root / name).read_bytes(), name
    before = (again.root / "benchmark.json").stat().st_mtime_ns
    build_benchmark(fake, tmp_path / "again", eval_rows=20, report=quiet)
    assert (again.root / "benchmark.json").stat().st_mtime_ns == before
    other = build_benchmark(fake, tmp_path / "again", eval_rows=10, report=quiet)
    assert other.info["settings"]["eval_rows"] == 10


def test_a_build_that_dies_leaves_nothing(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "card", lambda info: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_benchmark(fake, tmp_path / "bench", eval_rows=10, report=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_not_replaced(fake, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="Give another `root`"):
        build_benchmark(fake, tmp_path / "mine", report=quiet)


def test_the_card_names_every_licence(benchmark_folder):
    text = (benchmark_folder.root / "README.md").read_text()
    assert all(word in text for word in ("CC-BY 4.0", "WordNet licence", "Apache-2.0", "emojibase-data@17.0.0"))


def test_glosses_lose_their_examples(fake):
    glosses = wordnet_glosses(fake)
    assert (glosses[0].term, glosses[0].gloss) == ("term 0", "the meaning of number 0")
    assert (glosses[-1].term, glosses[-1].gloss) == ("able", "having what it needs")
    assert not any(gloss.term == "short" for gloss in glosses)
    _, validation, test = split_glosses(glosses)
    assert "twice" not in {gloss.term for gloss in validation + test}  # several senses
    with pytest.raises(ValueError, match="needs 4000 terms of one sense"):
        split_glosses(glosses, held_out=2000)


def test_each_concept_has_its_kinds_of_text_and_the_unseen_are_not_trained_on(benchmark_folder, fake):
    captions, trained = set(benchmark_folder.captions()), benchmark_folder.glosses("train")
    assert {gloss.term for gloss in trained} & {f"thing{i}" for i in range(30)}
    for split, concepts in concepts_of(fake, benchmark_folder).items():
        texts = benchmark_folder.texts(split)
        assert texts["label"] == [concept.label for concept in concepts]
        for concept, keywords, definition in zip(concepts, texts["keywords"], texts["definition"], strict=True):
            assert set(keywords.split(", ")) == {tag for tag in concept.tags if tag not in concept.words}
            thing = concept.label.startswith("thing")
            assert definition == (f"a thing with k1 upon it {concept.label.removeprefix('thing')}" if thing else "")
            if split != "train":
                assert concept.label not in captions | {gloss.term for gloss in trained}
                assert definition not in {gloss.gloss for gloss in trained}


def test_collage_places(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)]
    paths = []
    for index, colour in enumerate(colours):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (64, 64), colour).save(paths[-1])
    write_collage(paths, tmp_path / "four.png")
    write_collage(paths[:2], tmp_path / "two.png")
    four, two = Image.open(tmp_path / "four.png"), Image.open(tmp_path / "two.png")
    assert [four.getpixel(xy) for xy in ((40, 40), (120, 40), (40, 120), (120, 120))] == colours
    assert [two.getpixel(xy) for xy in ((40, 80), (120, 80), (40, 10))] == [*colours[:2], (255, 255, 255)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_on_white(mode):
    image = Image.new("LA" if mode == "LA" else "RGBA", (4, 4), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    if mode == "P":
        image = image.convert("P")
        image.info["transparency"] = image.getpixel((0, 0))
    assert np.asarray(on_white(image)).min() == 255
