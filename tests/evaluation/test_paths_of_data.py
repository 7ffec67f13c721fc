"""Evaluation data from strangers open nothing outside their folder, and one bad image does not end the evaluation."""

import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, Image, Value
from evaluation_fakes import HashModel

from broken_images import broken_files, broken_paths
from tiny import picture, tiny_encoder
from unime_st.data import load_mmeb_eval, load_mmeb_train, load_nli
from unime_st.embedding.distinct import BrokenItemError, encode_distinct, encode_indexed
from unime_st.evaluation import ImageTextRetrievalEvaluator, MMEBEvaluator, SugarCrepeEvaluator

ADVICE = "leaves the image folder|`image_root`"


@pytest.fixture
def world(tmp_path):
    """A folder with an image, and a secret beside it that some links lead to."""
    (tmp_path / "root").mkdir()
    picture("red").save(tmp_path / "root" / "ok.png")
    picture("green").save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("top secret")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_encoder("qwen2_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture
def opened(monkeypatch):
    """Names of what was opened as an image."""
    names, real = [], PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda file, *a, **k: names.append(str(file)) or real(file, *a, **k))
    return names


def ways_out(world):
    return [str(world / "secret.png"), "../secret.png", "link.png", "C:\\secret.png"]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_lists_of_images(world, opened):
    root = world / "root"
    for path in ways_out(world):
        entry = {"filename": path, "split": "test", "sentences": [{"raw": "a"}]}
        with pytest.raises(ValueError, match=ADVICE):
            ImageTextRetrievalEvaluator.from_karpathy_split(
                write(world / "karpathy.json", json.dumps({"images": [entry]})), root
            )
        folder = world / "root"
        write(folder / "metadata.jsonl", json.dumps({"file_name": path, "text": "a"}))
        with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: .*leaves the image folder"):
            ImageTextRetrievalEvaluator.from_folder(folder)
        crepe = [{"filename": path, "caption": "a", "negative_caption": "b"}]
        with pytest.raises(ValueError, match=r"swap_att\.json, entry 0: .*leaves the image folder"):
            SugarCrepeEvaluator.from_folder(
                write(world / "crepe" / "swap_att.json", json.dumps(crepe)).parent, world / "root"
            )
    filepath = {"filename": "secret.png", "filepath": "..", "split": "test", "sentences": [{"raw": "a"}]}
    with pytest.raises(ValueError, match=ADVICE):
        ImageTextRetrievalEvaluator.from_karpathy_split(
            write(world / "karpathy.json", json.dumps({"images": [filepath]})), root
        )
    for wrong in ({"raw": 5}, "a"):
        entry = {"filename": "ok.png", "split": "test", "sentences": [wrong]}
        with pytest.raises(ValueError, match=r"karpathy\.json: .* Expected"):
            ImageTextRetrievalEvaluator.from_karpathy_split(
                write(world / "karpathy.json", json.dumps({"images": [entry]})), root
            )
    write(world / "root" / "metadata.jsonl", json.dumps({"file_name": "ok.png", "text": None}))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1"):
        ImageTextRetrievalEvaluator.from_folder(world / "root")
    assert opened == []


def test_names_that_no_file_can_have(world):
    for name in ("a\0b.png", "\ud800.png", "x" * 300, "circle.png"):
        if name == "circle.png":
            (world / "root" / name).symlink_to(name)
        entry = {"filename": name, "split": "test", "sentences": [{"raw": "a"}]}
        path = write(world / "karpathy.json", json.dumps({"images": [entry]}))
        with pytest.raises(FileNotFoundError, match="There is no image"):
            ImageTextRetrievalEvaluator.from_karpathy_split(path, world / "root")


@pytest.mark.parametrize("which", ["image", "caption"])
def test_paired_folders(world, which):
    images, captions = world / "image", world / "caption"
    picture("red").save(write(images / "1.png", ""))
    write(captions / "1.txt", "a")
    evaluator = ImageTextRetrievalEvaluator.from_paired_folders(images, captions)
    assert (evaluator.texts, len(evaluator.images)) == (["a"], 1)
    linked = images / "2.png" if which == "image" else captions / "1.txt"
    linked.unlink(missing_ok=True)
    linked.symlink_to(world / f"secret{linked.suffix}")
    if which == "image":
        write(captions / "2.txt", "b")
    with pytest.raises(ValueError, match=r"leaves the (image|text) folder"):
        ImageTextRetrievalEvaluator.from_paired_folders(images, captions)
    linked.unlink()
    linked.mkdir()  # in place of a file
    with pytest.raises(FileNotFoundError, match="no regular file"):
        ImageTextRetrievalEvaluator.from_paired_folders(images, captions)


def captioned(image, feature):
    columns = {"image": [image], "caption": ["a"], "negative_caption": ["b"]}
    kinds = {"image": feature, "caption": Value("string"), "negative_caption": Value("string")}
    return Dataset.from_dict(columns, features=Features(kinds))


@pytest.mark.parametrize("form", ["string", "image"])
def test_data_sets_that_hold_paths(world, model, opened, form):
    """Paths need a folder that they are below; what holds the image itself needs none."""

    def rows(path):
        return captioned(path, Value("string") if form == "string" else Image())

    for path in [*ways_out(world), str(world / "root" / "ok.png")]:
        for make in (
            lambda given, **o: SugarCrepeEvaluator.from_datasets({"swap_att": given}, **o),
            ImageTextRetrievalEvaluator.from_dataset,
        ):
            with pytest.raises(ValueError, match=r"[Rr]ow 0 names a file, .* as `image_root`"):
                make(rows(path))
            if not path.endswith("ok.png"):
                with pytest.raises(ValueError, match=r"[Rr]ow 0: .*leaves the image folder"):
                    make(rows(path), image_root=world / "root")
    assert opened == []
    for path in ("ok.png", str(world / "root" / "ok.png")):
        retrieval = ImageTextRetrievalEvaluator.from_dataset(rows(path), image_root=world / "root")
        assert retrieval(model)["mean_recall@1"] == 1
        crepe = SugarCrepeEvaluator.from_datasets({"swap_att": rows(path)}, image_root=world / "root")
        assert 0 <= crepe(model)["sugarcrepe_swap_att_accuracy"] <= 1
    with pytest.raises(FileNotFoundError, match="Row 0: There is no image"):
        ImageTextRetrievalEvaluator.from_dataset(rows("none.png"), image_root=world / "root")
    inside = captioned(picture("red"), Image())
    assert ImageTextRetrievalEvaluator.from_dataset(inside)(model)["mean_recall@1"] == 1


def test_files_that_come_with_a_named_set_are_below_its_folder(world, monkeypatch):
    """What `load_dataset("imagefolder", ...)` gives are paths."""
    rows = captioned({"bytes": None, "path": str(world / "root" / "ok.png")}, Image())
    monkeypatch.setattr("unime_st.data.caption_sets.load_dataset", lambda *a, **k: rows)
    assert len(ImageTextRetrievalEvaluator.from_dataset(str(world / "root")).images) == 1
    with pytest.raises(ValueError, match="leaves the image folder"):
        ImageTextRetrievalEvaluator.from_dataset("owner/name")  # of the Hub: its cache
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", world)
    assert len(ImageTextRetrievalEvaluator.from_dataset("owner/name").images) == 1


def test_captions_are_never_opened(world, model, opened):
    """Whatever file they name: the embeddings are those of the words."""
    names = [str(world / "secret.png"), str(world / "secret.txt"), "https://a.org/b.png", "photo.png"]
    image = picture("red")
    evaluator = ImageTextRetrievalEvaluator([image, picture("blue")], [names[:2], names[2:]])
    evaluator(model)
    SugarCrepeEvaluator({"swap_att": [(image, *names[:2]), (image, *names[2:])]})(model)
    assert not any("secret" in name for name in opened)

    class Kept(HashModel):
        def encode(self, items, **kwargs):
            kept.extend(items)
            return super().encode(items, **kwargs)

    kept = []
    evaluator(Kept())
    assert [item for item in kept if isinstance(item, dict)] == [{"text": name} for name in sorted(names)]


@pytest.fixture
def tasks(world):
    """A task of MMEB beside its pictures, and one outside."""
    row = {"qry_text": "q", "qry_img_path": "ok.png", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    for folder in (world / "root" / "E", world / "outside"):
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist([row]), folder / "test-0.parquet")
    train = {"qry": "q", "qry_image_path": "ok.png", "pos_text": "a", "pos_image_path": ""}
    for folder in (world / "root" / "T", world / "outside"):
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([train]), folder / "original-0.parquet")
    return world


@pytest.mark.parametrize(
    "entry",
    [
        {"image_root": ".."},
        {"image_root": "/"},
        {"image_root": "link"},
        {"image_root": "C:\\"},
        {"dataset_split": "../../outside/test"},
        {"dataset_split": "*/../../outside/test"},
        {"dataset_name": "../outside"},
        {"dataset_name": "linked"},
    ],
    ids=str,
)
def test_lists_of_tasks(tasks, entry):
    root = tasks / "root"
    (root / "link").symlink_to(tasks)
    (root / "linked").symlink_to(tasks / "outside")
    path = tasks / "tasks.yaml"
    good = {"dataset_parser": "image_qa", "dataset_name": "E", "image_root": "."}
    path.write_text(yaml.safe_dump({"E": good}))
    assert MMEBEvaluator.from_yaml(path, root).tasks == ["E"]
    path.write_text(yaml.safe_dump({"E": {**good, **entry}}))
    with pytest.raises(ValueError, match=r"tasks\.yaml, task 'E': "):
        MMEBEvaluator.from_yaml(path, root)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_folders_of_tasks(tasks, what):
    root = tasks / "root"
    if what == "folder":
        (root / "F").symlink_to(tasks / "outside")
    else:
        (root / "F").mkdir()
        for name in ("test-0.parquet", "original-0.parquet"):
            (root / "F" / name).symlink_to(tasks / "outside" / name)
    for load in (lambda task: load_mmeb_eval(root, task, image_root=root), lambda task: load_mmeb_train(root, [task])):
        with pytest.raises(ValueError, match="leaves the data folder"):
            load("F")
    assert load_mmeb_eval(root, "E", image_root=root)[0]["query"]["image"].endswith("ok.png")
    for split in ("../../outside/test", "../outside/test", "t*t", "/test"):
        with pytest.raises(ValueError, match="is no beginning of files' names"):
            load_mmeb_eval(root, "E", split=split)
        with pytest.raises(ValueError, match="is no beginning of files' names"):
            load_mmeb_train(root, split=split)


def test_folders_of_texts(world):
    folder = world / "texts"
    write(folder / "a.txt", "one\ntwo\n")
    assert load_nli(folder)["text"][:] == ["one", "two"]
    (folder / "b.txt").symlink_to(world / "secret.txt")
    with pytest.raises(ValueError, match="leaves the text folder"):
        load_nli(folder)
    assert load_nli(world / "secret.txt")["text"][:] == ["top secret"]  # the user's own word


def test_every_kind_of_bad_image_is_reported(world, model, tmp_path):
    """By the row it stands in; a pipe is not waited for."""
    root = world / "root"
    files = broken_files()
    for name, content in files.items():
        (root / name).write_bytes(content)
    names = [*files, *broken_paths(root), "../secret.png", "link.png"]
    words = {"qry_text": "q", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    rows = [{**words, "qry_img_path": name} for name in ("ok.png", *names)]
    (root / "E").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), root / "E" / "test-0.parquet")
    evaluator = MMEBEvaluator(root, ["E"], image_root=root, on_error="report")
    metrics = evaluator(model)
    assert metrics["MMEB_unreadable_rows"] == len(names)
    assert sorted(evaluator.results["E"].errors) == list(range(1, len(names) + 1))
    assert all(evaluator.results["E"].errors.values())
    for row, name in enumerate(names, start=1):
        if name in ("text-bomb.png", "thin.png", "pipe.png", "a\0b.png"):
            pq.write_table(pa.Table.from_pylist([*rows[:1] * row, rows[row]]), root / "E" / "test-0.parquet")
            with pytest.raises((ValueError, FileNotFoundError), match=rf"^E, row {row}"):
                MMEBEvaluator(root, ["E"], image_root=root)(model)


def test_items_in_lists_are_told_apart(world, model):
    files = broken_files()
    items = [{"image": files[name]} for name in ("icc-bomb.png", "broken.avif", "broken.dds", "broken.sgi", "thin.png")]
    items = [{"text": "a"}, *items, {"image": picture("red")}]
    embeddings, index, errors = encode_indexed(model, items, on_error="report")
    assert sorted(errors) == [1, 2, 3, 4, 5]
    assert np.isfinite(embeddings).all()
    assert index.tolist() == [0, -1, -1, -1, -1, -1, 1]
    with pytest.raises(BrokenItemError, match="Item 4 cannot be encoded"):
        encode_distinct(model, [*items[:1] * 4, items[5]])
