import json

import numpy as np
import pytest
from evaluation_fakes import HashModel
from PIL import Image

from unime_st.evaluation import ImageTextRetrievalEvaluator


class Table(HashModel):
    """Looks embeddings up: a number for an image's grey, a caption by its text."""

    def __init__(self, texts, images):
        super().__init__()
        self.texts, self.images = texts, images

    def vector(self, item, prompt=""):
        if isinstance(item, dict) and "text" in item:
            return self.texts[item["text"]]
        if isinstance(item, dict):
            with Image.open(item["image"]) as image:
                return self.images[image.convert("L").getpixel((0, 0))]
        return self.images[int(item.flat[0])]


def cosines(queries, candidates):
    unit = [np.stack(side) / np.linalg.norm(np.stack(side), axis=1, keepdims=True) for side in (queries, candidates)]
    return np.round(unit[0] @ unit[1].T, 5)


def greys(count):
    return [np.full((2, 2, 3), number, dtype=np.uint8) for number in range(count)]


@pytest.mark.parametrize("seed", range(30))
def test_recalls_against_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    n_images = int(rng.integers(2, 9))
    captions = [[f"image {i} caption {c}" for c in range(rng.integers(1, 6))] for i in range(n_images)]
    texts = [text for own in captions for text in own]
    model = Table(
        {text: rng.integers(-2, 3, size=6) + 0.5 for text in texts},  # few values: ties happen
        {number: rng.integers(-2, 3, size=6) + 0.5 for number in range(n_images)},
    )
    ks = (1, 2, 3)
    evaluator = ImageTextRetrievalEvaluator(greys(n_images), captions, ks=ks, chunk_size=3)
    metrics = evaluator(model)
    weight = model.weight.detach().numpy()
    table = cosines([model.texts[t] @ weight for t in texts], [model.images[i] @ weight for i in range(n_images)])
    owner = [number for number, own in enumerate(captions) for _ in own]

    def hit(scores, right, k):
        """Right at k: wrong candidates as good as the best right one go first."""
        best = max(scores[place] for place in right)
        return sum(score >= best for place, score in enumerate(scores) if place not in right) < k

    for k in ks:
        by_text = np.mean([hit(table[text], [owner[text]], k) for text in range(len(texts))])
        of = [[text for text in range(len(texts)) if owner[text] == image] for image in range(n_images)]
        by_image = np.mean([hit(table[:, image], of[image], k) for image in range(n_images)])
        assert metrics[f"text_to_image_recall@{k}"] == pytest.approx(by_text)
        assert metrics[f"image_to_text_recall@{k}"] == pytest.approx(by_image)
        assert metrics[f"mean_recall@{k}"] == pytest.approx((by_text + by_image) / 2)


def separable(count=40):
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(count, 6))
    texts = {f"image {number} caption {c}": directions[number] for number in range(count) for c in range(2)}
    captions = [[f"image {number} caption {c}" for c in range(2)] for number in range(count)]
    return Table(texts, dict(enumerate(directions))), captions


def test_a_perfect_model_and_shuffled_images():
    model, captions = separable()
    evaluator = ImageTextRetrievalEvaluator(greys(40), captions, name="sets")
    metrics = evaluator(model)
    assert evaluator.primary_metric == "sets_mean_recall@1"
    assert metrics["sets_text_to_image_recall@1"] == metrics["sets_image_to_text_recall@1"] == 1.0
    assert evaluator.last_details["text_to_image"][5]["top"][0] == 2  # caption 5 is the second of image 2
    assert evaluator.last_details["image_to_text"][5]["rank"] == 1

    shuffled = [ImageTextRetrievalEvaluator(greys(40), captions, shuffle_images_seed=seed)(model) for seed in range(10)]
    chance = evaluator.chance()
    for key, expected in chance.items():
        assert np.mean([metrics[key] for metrics in shuffled]) == pytest.approx(expected, abs=0.05 + expected / 3)
    assert chance["text_to_image_recall@10"] == 0.25


def test_defect_7_a_direction_is_named_by_its_query():
    """Both captions of the first image find it, and the second image finds none of its own: text_to_image is better."""
    corner = np.eye(6)
    texts = {"a": corner[0], "b": corner[0], "c": corner[1]}
    model = Table(texts, {0: corner[0], 1: corner[1] + 1.5 * corner[0]})
    metrics = ImageTextRetrievalEvaluator(greys(2), [["a", "b"], ["c"]], ks=(1,))(model)
    assert metrics["text_to_image_recall@1"] == 1.0
    assert metrics["image_to_text_recall@1"] == 0.5


def test_chance_is_that_of_a_random_order():
    captions = [["a", "b", "c"], ["d"], ["e", "f"]]
    chance = ImageTextRetrievalEvaluator(greys(3), captions, ks=(1, 2, 10)).chance()
    assert chance["image_to_text_recall@1"] == pytest.approx((3 / 6 + 1 / 6 + 2 / 6) / 3)
    assert chance["image_to_text_recall@10"] == chance["text_to_image_recall@10"] == 1.0


def test_equal_images_and_captions_are_one_candidate_encoded_once():
    texts = {"a dog": [1, 0, 0, 0, 0, 0], "a cat": [0, 1, 0, 0, 0, 0], "a bus": [0, 0, 1, 0, 0, 0]}
    model = Table({text: np.array(vector, float) for text, vector in texts.items()}, dict(enumerate(np.eye(6))))
    images = [*greys(3), greys(3)[0]]
    evaluator = ImageTextRetrievalEvaluator(images, [["a dog"], ["a cat", "a dog"], ["a bus"], ["a dog"]], ks=(1,))
    metrics = evaluator(model)
    assert len(model.encoded) == 6
    assert metrics["image_to_text_recall@1"] == 1.0
    assert metrics["text_to_image_recall@1"] == 4 / 5  # only the dog that is meant to find the cat's image cannot


def test_a_collapsed_model_scores_zero_and_says_why():
    model = Table({f"t{i}": np.ones(6) for i in range(8)}, {i: np.ones(6) for i in range(8)})
    metrics = ImageTextRetrievalEvaluator(greys(8), [[f"t{i}"] for i in range(8)], ks=(1, 5))(model)
    assert metrics["text_to_image_recall@5"] == metrics["image_to_text_recall@5"] == 0.0
    assert metrics["text_to_image_ties"] == metrics["image_to_text_ties"] == 8


def test_gallery_entries():
    model, captions = separable(12)
    evaluator = ImageTextRetrievalEvaluator(greys(12), captions)
    with pytest.raises(ValueError, match="Evaluate a model first"):
        evaluator.top()
    evaluator(model)
    (entry,) = evaluator.top(3, "text_to_image", queries=[7])
    assert entry["query"] == "image 3 caption 1"
    assert entry["rank"] == 1
    assert [result["right"] for result in entry["results"]] == [True, False, False]
    entry = evaluator.top(2, "image_to_text")[3]
    assert {result["text"] for result in entry["results"]} == set(captions[3])
    assert all(result["right"] for result in entry["results"])


def test_files_and_cache(tmp_path):
    model, captions = separable()
    evaluator = ImageTextRetrievalEvaluator(greys(40), captions, name="a/b", cache_dir=tmp_path / "cache")
    first = evaluator(model, str(tmp_path / "out"), epoch=1, steps=10)
    count = len(model.encoded)
    assert count == 120
    assert evaluator(model, str(tmp_path / "out"), epoch=2, steps=20) == first
    assert len(model.encoded) == count
    (table,) = (tmp_path / "out").glob("*.csv")
    lines = table.read_text().splitlines()
    assert lines[0].startswith("epoch,steps,text_to_image_recall@1")
    assert lines[2].startswith("2,20,1.0")
    (result,) = (tmp_path / "out").glob("*.json")
    assert json.loads(result.read_text()) == first


def test_from_folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (4, 4), (number,) * 3).save(tmp_path / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": [f"t{number}", f"u{number}"]} for number in range(3)]
    rows.append({"file_name": "0.png", "text": "v0"})
    lines = tmp_path / "metadata.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    evaluator = ImageTextRetrievalEvaluator.from_folder(tmp_path)
    assert evaluator.texts == ["t0", "u0", "v0", "t1", "u1", "t2", "u2"]
    assert evaluator.name == tmp_path.name
    model = Table({text: np.eye(6)[int(text[1])] for text in evaluator.texts}, dict(enumerate(np.eye(6))))
    assert evaluator(model)[f"{tmp_path.name}_mean_recall@1"] == 1.0

    for bad, message in (('{"file_name": "0.png"}', "line 1: KeyError"), ("{", "line 1"), ("[]", "line 1: TypeError")):
        lines.write_text(bad)
        with pytest.raises(ValueError, match=message):
            ImageTextRetrievalEvaluator.from_folder(tmp_path)
    lines.write_text('{"file_name": "../secret.png", "text": "x"}')
    with pytest.raises(ValueError, match="line 1"):
        ImageTextRetrievalEvaluator.from_folder(tmp_path)
    lines.write_text('{"file_name": "none.png", "text": "x"}')
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        ImageTextRetrievalEvaluator.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("images", "captions", "ks", "message"),
    [
        ([], [], (1,), "0 images"),
        (greys(2), [["a"]], (1,), "captions for 1"),
        (greys(2), [["a"], []], (1,), "Image 1 has captions"),
        (greys(2), [["a"], "b"], (1,), "Image 1 has captions 'b'"),
        (greys(1), [["a"]], (0, 1), "at least 1"),
    ],
)
def test_refusals(images, captions, ks, message):
    with pytest.raises(ValueError, match=message):
        ImageTextRetrievalEvaluator(images, captions, ks=ks)
