import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict
from PIL import Image
from sentence_transformers.base.data_collator import BaseDataCollator
from torch.utils.data import DataLoader

from unime_st.data import ItemReader, load_mmeb_eval, load_mmeb_train, resolve_image
from unime_st.data.parquet import clean_text
from unime_st.evaluation import MMEBEvaluator
from unime_st.evaluation.mmeb.tasks import META_TASKS
from unime_st.prompts import TARGET_INSTRUCTIONS
from unime_st.samplers import FalseNegativeAwareBatchSampler

TAG = "<|image_1|>"


def write(root, name, rows, split="original", number=0, of=1):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-{number:05d}-of-{of:05d}.parquet")


def train_row(query="", query_image="", positive="", positive_image="", **negatives):
    return {
        "qry": query, "qry_image_path": query_image, "pos_text": positive, "pos_image_path": positive_image, **negatives
    }  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """Two subsets of MMEB-train's layout, images below `images`."""
    for name, size, colour in (
        ("a/red.png", (8, 4), "red"),
        ("a/green.png", (6, 6), "green"),
        ("b.jpg", (20, 10), "blue"),
    ):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(path)
    write(
        tmp_path,
        "VOC2007",
        [
            train_row(f"{TAG}\nWhat is shown?\n", "a/red.png", "a car", neg_text="a bus", neg_image_path=""),
            train_row(f"{TAG}\nWhat is shown?\n", "a/green.png", "a tree", neg_text="", neg_image_path=""),
            train_row("", "", "a car", neg_text="x", neg_image_path=""),
            train_row(f"{TAG}\nWhat is shown?\n", "b.jpg", f"{TAG} ", neg_text="x", neg_image_path=""),
        ],
        of=2,
    )
    write(
        tmp_path,
        "VOC2007",
        [train_row(f"{TAG}\nWhich?\n", "b.jpg", "a sea", neg_text="a lake", neg_image_path="")],
        number=1,
        of=2,
    )
    write(
        tmp_path,
        "MSCOCO_t2i",
        [
            train_row("Find an image: a car", "", f"{TAG}\nRepresent the given image.\n", "a/red.png"),
            train_row("Find an image: a tree", "", "", "a/green.png"),
        ],
    )
    write(
        tmp_path, "MSCOCO_t2i", [train_row("Another wording: a car", "", "", "a/red.png")], split="diverse_instruction"
    )
    return tmp_path


def described(item):
    """An input with its images' colours in place of the images."""
    if "image" in item:
        return {**item, "image": item["image"].getpixel((0, 0))}
    return item


def test_rows_become_inputs_with_lazy_images_and_their_negatives(root, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = load_mmeb_train(root, ["VOC2007", "MSCOCO_t2i"])
    assert dataset.column_names == ["anchor", "positive", "negative_1"]
    red, green, blue = (255, 0, 0), (0, 128, 0), (0, 0, 254)
    assert [[described(item) for item in row.values()] for row in dataset] == [
        [{"image": red, "text": "What is shown?"}, {"text": "a car"}, {"text": "a bus"}],
        [{"image": green, "text": "What is shown?"}, {"text": "a tree"}, {"text": "a sea"}],
        [{"image": blue, "text": "Which?"}, {"text": "a sea"}, {"text": "a lake"}],
        [{"text": "Find an image: a car"}, {"image": red, "text": "Represent the given image."}, {"image": green}],
        [{"text": "Find an image: a tree"}, {"image": green}, {"image": red, "text": "Represent the given image."}],
    ]
    assert "VOC2007: skipped 2 of 5 rows with an empty query or positive" in caplog.text
    assert "VOC2007: 1 of 3 rows have no explicit negative" in caplog.text
    assert "MSCOCO_t2i: 2 of 2 rows have no explicit negative" in caplog.text
    stored = dataset.with_format(None)[0]
    assert stored["anchor"] == {"image": "a/red.png", "text": "What is shown?"}  # never stored decoded


def test_subsets_splits_and_sizes(root):
    assert len(load_mmeb_train(root)) == 5
    assert load_mmeb_train(root, ["MSCOCO_t2i"]).column_names == ["anchor", "positive"]
    assert load_mmeb_train(root, num_negatives=0).column_names == ["anchor", "positive"]
    assert load_mmeb_train(root, num_negatives=2).column_names[2:] == ["negative_1", "negative_2"]
    assert len(load_mmeb_train(root, max_rows=1)) == 2
    assert load_mmeb_train(root, split="diverse_instruction")[0]["anchor"] == {"text": "Another wording: a car"}


def test_lists_of_negatives_fill_as_many_columns(tmp_path, caplog):
    rows = [
        train_row("q1", "", "p1", neg_text=["n1", "", "n2"], neg_image_path=["", "", "x.png"]),
        train_row("q2", "", "p2", neg_text=["n3"], neg_image_path=[""]),
        train_row("q3", "", "p3", neg_text=[], neg_image_path=[]),
        train_row("q4", "", "p4", neg_text=None, neg_image_path=None),
    ]
    write(tmp_path, "Own", rows)
    dataset = load_mmeb_train(tmp_path).with_format(None)
    pairs = [[(row[name]["text"], row[name]["image"]) for name in ("negative_1", "negative_2")] for row in dataset]
    assert pairs == [[("n1", None), ("n2", "x.png")], [("n3", None)] * 2, [("p4", None)] * 2, [("p1", None)] * 2]
    write(tmp_path, "Own", [train_row("q", "", "p", neg_text=["a", "b"], neg_image_path=["c"])])
    with pytest.raises(ValueError, match=r"Own, row 0 of original.* has 2 texts but 1 image paths"):
        load_mmeb_train(tmp_path)


def test_negatives_of_images_only_or_text_only_need_one_column(tmp_path):
    for number, column in enumerate(("neg_text", "neg_image_path")):
        write(tmp_path, f"Own{number}", [train_row("q", "", "p", **{column: "value"})])
    dataset = load_mmeb_train(tmp_path).with_format(None)
    assert dataset["negative_1"][:] == [{"image": None, "text": "value"}, {"image": "value", "text": None}]


def test_labels_identify_the_target(root):
    dataset = load_mmeb_train(root, label=True).with_format(None)
    labels = dict(zip([str(item) for item in dataset["positive"]], dataset["label"], strict=True))
    assert len(set(labels.values())) == len(labels) == 5
    write(root, "VOC2007", [train_row("q1", "", "same"), train_row("q2", "", "same"), train_row("q3", "", "other")])
    (root / "VOC2007" / "original-00001-of-00002.parquet").unlink()
    (root / "VOC2007" / "original-00000-of-00002.parquet").unlink()
    first, second, third = load_mmeb_train(root, ["VOC2007"], label=True)["label"]
    assert first == second != third
    assert first >= 0


@pytest.mark.parametrize("workers", [0, 2])
def test_collator_and_sampler_take_the_rows(root, workers):
    """Mixed columns pass the stock collator, nothing is None, and images are opened in the workers."""
    seen = []
    dataset = load_mmeb_train(root, label=True)
    sampler = FalseNegativeAwareBatchSampler(dataset, 2, False, ["label"])
    collator = BaseDataCollator(lambda inputs, **_: {"input_ids": inputs})
    for batch in DataLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=workers):
        seen += batch["anchor_input_ids"] + batch["positive_input_ids"]
        assert batch["label"].dtype.is_floating_point is False
    assert len(seen) == 10
    assert all(value is not None and value != "" for item in seen for value in item.values())
    assert sum(isinstance(item.get("image"), Image.Image) for item in seen) == 5
    assert len(DatasetDict({"one": dataset})["one"]) == 5
    assert pickle.loads(pickle.dumps(dataset))[2]["anchor"]["image"].size == (8, 4)


def test_resolution_policy(root):
    def sizes(**policy):
        return [row["anchor"]["image"].size for row in load_mmeb_train(root, ["VOC2007"], **policy)]

    assert sizes() == [(8, 4), (6, 6), (20, 10)]
    assert sizes(max_pixels=36) == [(8, 4), (6, 6), (8, 4)]
    assert sizes(image_size=5) == [(5, 5)] * 3
    assert sizes(image_size=(3, 7)) == [(3, 7)] * 3
    for wrong, advice in (
        ({"max_pixels": 9, "image_size": 3}, "not both"),
        ({"max_pixels": 0}, "one pixel"),
        ({"image_size": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=advice):
            load_mmeb_train(root, **wrong)


def test_rows_may_be_drawn_from_all_of_a_subset(tmp_path):
    for number in range(3):
        rows = [train_row(f"q{number}{row}", "", "", f"{row}.png", neg_text="n", neg_image_path="") for row in range(7)]
        write(tmp_path, "Own", rows, number=number, of=3)
    write(tmp_path, "Other", [train_row(f"o{row}", "", "p") for row in range(3)])

    def texts(subsets=None, **options):
        return [cell["text"] for cell in load_mmeb_train(tmp_path, subsets, **options).with_format(None)["anchor"]]

    whole = texts(["Own"])
    assert len(whole) == 21
    assert texts(["Own"], max_rows=9) == whole[:9]
    assert texts(["Own"], max_rows=99, shuffle_seed=3) == whole
    drawn = texts(["Own"], max_rows=9, shuffle_seed=3)
    assert len(set(drawn)) == 9
    assert drawn == sorted(drawn)
    assert drawn != whole[:9]
    assert drawn == texts(["Own"], max_rows=9, shuffle_seed=3) != texts(["Own"], max_rows=9, shuffle_seed=4)
    assert texts(max_rows=9, shuffle_seed=3) == ["o0", "o1", "o2", *drawn]
    write(tmp_path, "Own", [train_row("q", "", "p", neg_text=["a", "b"], neg_image_path=["c"])], number=2, of=3)
    with pytest.raises(ValueError, match=r"Own, row 0 of original-00002"):
        load_mmeb_train(tmp_path, ["Own"], max_rows=14 + 1, shuffle_seed=0)


def test_borrowed_positives_agree_with_a_plain_search(tmp_path):
    positives = [f"p{number}" for number in np.random.default_rng(0).integers(0, 3, 40)]
    for name, targets in (("Own", positives), ("Ends", ["a", "b", "a"]), ("Same", ["a", "a"])):
        write(tmp_path, name, [train_row(f"q{row}", "", target) for row, target in enumerate(targets)])
        dataset = load_mmeb_train(tmp_path, [name], num_negatives=2).with_format(None)
        for row, target in enumerate(targets):
            circle = [*targets[row + 1 :], *targets[:row]]
            expected = next((other for other in circle if other != target), target)
            assert [dataset[row][f"negative_{k}"]["text"] for k in (1, 2)] == [expected] * 2


def test_clean_text():
    assert clean_text(f"{TAG}\nRepresent the image.\n") == "Represent the image."
    assert clean_text(f"before {TAG}\nafter") == "before\nafter"
    assert clean_text(f"{TAG} <|image_2|>") == clean_text(None) == ""
    assert clean_text("a dog", f"{TAG} Find: ") == "Find: a dog"
    assert clean_text("a dog", "Find:") == "Find: a dog"


# Errors: each names the data set, the file and, where there is one, the row.


def test_missing_and_unreadable_images_name_their_row(root):
    dataset = load_mmeb_train(root)
    (root / "images" / "b.jpg").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"VOC2007, row 3 of original-00000-of-00002.parquet: Cannot read image .*b\.jpg"
    ):
        list(dataset)
    whole = (root / "images" / "a" / "green.png").read_bytes()
    (root / "images" / "a" / "green.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"MSCOCO_t2i, row 1 of .*Cannot read image .*green\.png"):
        list(load_mmeb_train(root, ["MSCOCO_t2i"]))
    (root / "images" / "a" / "red.png").unlink()
    lost = load_mmeb_train(root)
    with pytest.raises(FileNotFoundError, match=r"MSCOCO_t2i, row 0 of .*: There is no image 'a/red.png' below"):
        lost[0]
    with pytest.raises(FileNotFoundError, match=r"row 0 of .*: There is no image 'a/red.png'"):
        load_mmeb_train(root, check_images=True)


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "a/../../secret.png", "link.png", "C:\\secret.png", "..\\secret.png"]
)
def test_images_never_leave_their_folder(root, path):
    Image.new("RGB", (2, 2)).save(root / "secret.png")
    (root / "images" / "link.png").symlink_to(root / "secret.png")
    with pytest.raises(ValueError, match="leaves the image folder"):
        resolve_image(root / "images", path)
    write(root, "Evil", [train_row("q", path, "p")])
    with pytest.raises(ValueError, match=r"Evil, row 0 of .*leaves the image folder"):
        load_mmeb_train(root, ["Evil"])[0]
    with pytest.raises(ValueError, match=r"Evil, row 0 of .*leaves the image folder"):
        load_mmeb_train(root, ["Evil"], check_images=True)


def test_images_inside_may_be_linked(root):
    (root / "images" / "link.png").symlink_to(root / "images" / "a" / "red.png")
    assert resolve_image(root / "images", "link.png") == (root / "images" / "a" / "red.png").resolve()
    (root / "other").symlink_to(root / "images")  # the folder itself may be a link
    assert resolve_image(root / "other", "b.jpg").is_file()
    with pytest.raises(FileNotFoundError, match="no image 'a' below"):
        resolve_image(root / "images", "a")


def test_wrong_files_and_columns(root):
    with pytest.raises(
        FileNotFoundError, match=r"no Imagenet with files named original-\*.parquet; it has MSCOCO_t2i, VOC2007"
    ):
        load_mmeb_train(root, ["VOC2007", "Imagenet"])
    with pytest.raises(FileNotFoundError, match=r"no data set with files named test-\*"):
        load_mmeb_train(root, split="test")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_mmeb_train(root / "nowhere")
    write(root, "Own", [{"query": "a", "pos_text": "b", "pos_image_path": ""}])
    with pytest.raises(
        ValueError, match=r"Own: .* has no column qry, qry_image_path. Found: query, .*Expected: qry, .*neg_text"
    ):
        load_mmeb_train(root)
    write(root, "Own", [train_row("q", "", "p", source="kept elsewhere")])
    assert len(load_mmeb_train(root, ["Own"])) == 1
    write(root, "Own", [train_row("q", "", "p", neg_txt="a negative that would be lost")])
    with pytest.raises(ValueError, match=r"Own: .*original-.* has the unknown column neg_txt. Known are .*neg_text"):
        load_mmeb_train(root)
    write(root, "Own", [train_row("q", {"bytes": b"x"}, "p")])
    with pytest.raises(ValueError, match=r"column qry_image_path of .* holds struct.*given by its path"):
        load_mmeb_train(root)
    write(root, "Own", [train_row("", "", "p")])
    with pytest.raises(ValueError, match="Own: of 1 rows none has a query and a positive"):
        load_mmeb_train(root)
    with pytest.raises(ValueError, match="`num_negatives=-1`"):
        load_mmeb_train(root, num_negatives=-1)
    for kept in (40, 0):
        file = root / "VOC2007" / "original-00001-of-00002.parquet"
        file.write_bytes(file.read_bytes()[:-kept] if kept else b"")
        with pytest.raises(
            ValueError, match=r"VOC2007: .*original-00001-of-00002.parquet is damaged or no parquet file"
        ):
            load_mmeb_train(root, ["VOC2007"])


# MMEB-eval


def eval_row(query="", query_image="", targets=(), target_images=None, **instructions):
    images = [""] * len(targets) if target_images is None else list(target_images)
    return {
        "qry_text": query,
        "qry_img_path": query_image,
        "tgt_text": list(targets),
        "tgt_img_path": images,
        **instructions,
    }


def test_evaluation_rows(root):
    rows = [
        eval_row(f"{TAG}\nWhat is it?\n", "a/red.png", ["a car", "a tree"]),
        eval_row("Find: a tree", "", ["", f"{TAG}\nRepresent."], ["a/green.png", "a/red.png"]),
    ]
    write(root, "Task", rows, split="test", of=2)
    write(root, "Task", [eval_row("q", "", ["x", "y", "z"])], split="test", number=1, of=2)
    dataset = load_mmeb_eval(root, "Task")
    images = (root / "images").resolve()
    assert dataset[:] == {
        "query": [{"image": f"{images}/a/red.png", "text": "What is it?"}, {"text": "Find: a tree"}, {"text": "q"}],
        "candidates": [
            [{"text": "a car"}, {"text": "a tree"}],
            [{"image": f"{images}/a/green.png"}, {"image": f"{images}/a/red.png", "text": "Represent."}],
            [{"text": "x"}, {"text": "y"}, {"text": "z"}],
        ],
    }
    opened = load_mmeb_eval(root, "Task", image_size=4)[1]["candidates"]
    assert [np.asarray(item["image"]).shape for item in opened] == [(4, 4, 3)] * 2
    assert load_mmeb_eval(root, "Task", image_root=root / "images" / "a")[2]["query"] == {"text": "q"}


def test_instructions_in_columns_of_their_own(root):
    row = eval_row(
        "a tree",
        "",
        ["", "brown"],
        ["a/green.png", "a/red.png"],
        qry_inst=f"{TAG} Find: ",
        tgt_inst=f"{TAG} Represent. ",
    )
    write(root, "V2", [row], split="test")
    dataset = load_mmeb_eval(root, "V2")
    assert dataset[0]["query"] == {"text": "Find: a tree"}
    assert [item["text"] for item in dataset[0]["candidates"]] == ["Represent.", "Represent. brown"]


def test_empty_candidates(root, caplog):
    write(root, "Task", [eval_row("q", "", ["right", "", "wrong"])], split="test")
    with caplog.at_level(logging.WARNING):
        assert load_mmeb_eval(root, "Task")[0]["candidates"] == [{"text": "right"}, {"text": "wrong"}]
    assert "Task: left out 1 empty wrong candidates" in caplog.text
    for row in (eval_row("", "", ["right"]), eval_row("q", "", ["", "wrong"]), eval_row("q", "", [])):
        write(root, "Task", [eval_row("q", "", ["a"]), row], split="test")
        with pytest.raises(ValueError, match=r"Task, row 1 of test-.* has an empty query or an empty right answer"):
            load_mmeb_eval(root, "Task")


def test_evaluation_errors(root):
    with pytest.raises(FileNotFoundError, match="no Task with files named test-"):
        load_mmeb_eval(root, "Task")
    write(root, "Task", [eval_row("q", "", ["a", "b"], ["x.png"])], split="test")
    with pytest.raises(ValueError, match=r"Task, row 0 of test-.* has 2 texts but 1 image paths"):
        load_mmeb_eval(root, "Task")
    write(root, "Task", [{"qry_text": "q"}], split="test")
    with pytest.raises(ValueError, match=r"no column qry_img_path, tgt_text. Found: qry_text"):
        load_mmeb_eval(root, "Task")
    write(root, "Task", [eval_row("q", "../x.png", ["a"])], split="test")
    with pytest.raises(ValueError, match=r"Task, row 0 of test-.*leaves the image folder"):
        load_mmeb_eval(root, "Task")[0]


def test_a_reader_without_origin_and_single_cells(root):
    reader = ItemReader(root / "images", max_pixels=8)
    item = reader.read({"image": "b.jpg", "text": None})
    assert list(item) == ["image"]
    assert item["image"].size == (4, 2)
    assert reader({"x": []}) == {"x": []}
    with pytest.raises(FileNotFoundError, match=r"^There is no image"):
        reader.read({"image": "none.png", "text": None})


def test_target_instructions_go_before_targets_in_training_and_evaluation(root, tmp_path):
    told = {"VOC2007": "Represent the class label:", "another": "unused"}
    plain, rows = (load_mmeb_train(root, target_instructions=given) for given in (None, told))
    assert len(rows) == len(plain) > 3
    changed = 0
    for before, after in zip(plain.with_format(None), rows.with_format(None), strict=True):
        assert after["anchor"] == before["anchor"]
        for name in ("positive", "negative_1"):
            labelled = "Represent the class label: " + (before[name]["text"] or "")
            changed += after[name]["text"] == labelled
            assert after[name] in (before[name], {**before[name], "text": labelled})
    assert changed == 6  # both columns of VOC2007's three rows
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a car", ""], "tgt_img_path": ["", ""]}
    write(tmp_path, "ImageNet-1K", [row], split="test")
    found = load_mmeb_eval(tmp_path, "ImageNet-1K", target_instruction=TARGET_INSTRUCTIONS["ImageNet-1K"])[0]
    assert found["candidates"] == [{"text": "Represent the class label: a car"}]
    write(tmp_path, "Told", [{**row, "tgt_inst": "Find:"}], split="test")
    assert load_mmeb_eval(tmp_path, "Told", target_instruction="x")[0]["candidates"][0] == {"text": "Find: a car"}


@pytest.mark.parametrize(("told", "before"), [(None, ""), ("Find:", "Find: ")])
def test_texts_are_cleaned_once_and_nothing_is_put_before_nothing(tmp_path, told, before):
    text = "a  \nb"  # cleaned twice it would lose both blanks
    write(tmp_path, "Set", [train_row("q", positive=text, neg_text=[text, TAG], neg_image_path=["", ""])])
    row = load_mmeb_train(tmp_path, target_instructions={"Set": told} if told else None)[0]
    assert row["positive"] == row["negative_1"] == {"text": f"{before}a \nb"}
    assert "negative_2" not in row
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": [text, TAG, " "], "tgt_img_path": ["", "", ""]}
    write(tmp_path, "Set", [row], split="test")
    found = load_mmeb_eval(tmp_path, "Set", target_instruction=told)[0]
    assert found["candidates"] == [{"text": f"{before}a \nb"}]


def test_the_instructions_of_b3_cover_its_sets():
    assert (
        len(TARGET_INSTRUCTIONS) == 23
    )  # 10 of classification, one of them under two names, 10 of questions, 2 of captions
    assert sorted({*TARGET_INSTRUCTIONS.values()}) == [
        "Represent the answer:", "Represent the class label:", "Represent the image caption:"
    ]  # fmt: skip
    known = {*META_TASKS, "ImageNet_1K"}
    assert known >= {*TARGET_INSTRUCTIONS}
    meta = {name: META_TASKS[name] for name in TARGET_INSTRUCTIONS if name != "ImageNet_1K"}
    for name, kind in meta.items():
        expected = {"Classification": "class label", "VQA": "answer", "Retrieval": "image caption"}[kind]
        assert TARGET_INSTRUCTIONS[name] == f"Represent the {expected}:"
    assert {name for name, kind in META_TASKS.items() if kind in ("Classification", "VQA")} < {*TARGET_INSTRUCTIONS}


@pytest.mark.parametrize("given", [["a"], {"VOC2007": 5}])
def test_target_instructions_of_another_kind_are_refused(root, given):
    with pytest.raises(TypeError, match="`target_instructions"):
        load_mmeb_train(root, target_instructions=given)


def test_the_evaluator_takes_target_instructions_by_task(tmp_path):
    for name in ("ImageNet-1K", "CIRR"):
        write(tmp_path, name, [{"qry_text": "q", "qry_img_path": "", "tgt_text": ["a"], "tgt_img_path": [""]}], "test")
    evaluator = MMEBEvaluator(tmp_path, ["ImageNet-1K", "CIRR"], target_instructions=TARGET_INSTRUCTIONS)
    read = [task.load(on_error="raise").items for task in evaluator._tasks]
    assert read == [[{"text": "q"}, {"text": "Represent the class label: a"}], [{"text": "q"}, {"text": "a"}]]
    with pytest.raises(TypeError, match="`target_instructions` has 'CIRR': 5"):
        MMEBEvaluator(tmp_path, target_instructions={"CIRR": 5})
