import json
import subprocess
import sys

import numpy as np
import pytest
from evaluation_fakes import HashModel
from PIL import Image

from unime_st.evaluation import SugarCrepeEvaluator


class Image2Text(HashModel):
    def vector(self, item, prompt=""):
        if isinstance(item, dict) and "image" in item:
            with Image.open(item["image"]) as image:
                return super().vector(f"grey {image.convert('L').getpixel((0, 0))}")
        return super().vector(item)


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        Image.new("L", (4, 4), number).save(images / f"{number}.png")
    rng = np.random.default_rng(0)
    for name in ("replace_att", "replace_obj", "swap_att", "add_obj"):
        rows = {
            str(number): {
                "filename": f"{rng.integers(6)}.png",
                "caption": f"{name} {number}",
                "negative_caption": f"not {name} {number}" if number % 5 else f"{name} {number}",
            }
            for number in range(20)
        }
        entries = rows if name != "swap_att" else list(rows.values())
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_accuracy_against_a_plain_loop(folder):
    evaluator = SugarCrepeEvaluator.from_folder(folder, folder / "images")
    model = Image2Text()
    metrics = evaluator(model)
    assert len(model.encoded) == 6 + 4 * (20 + 16)  # recurring images and captions once
    weight = model.weight.detach().numpy()
    expected = {}
    for name, rows in evaluator.sets.items():
        right = []
        for image, caption, negative in rows:
            cells = ({"image": str(image)}, {"text": caption}, {"text": negative})
            vectors = [model.vector(item) @ weight for item in cells]
            right.append(caption != negative and cosine(*vectors[:2]) > cosine(vectors[0], vectors[2]))
        expected[name] = np.mean(right)
        assert metrics[f"sugarcrepe_{name}_accuracy"] == pytest.approx(expected[name])
    groups = [(expected["replace_att"] + expected["replace_obj"]) / 2, expected["swap_att"], expected["add_obj"]]
    assert [metrics[f"sugarcrepe_{group}_accuracy"] for group in ("Replace", "Swap", "Add")] == pytest.approx(groups)
    assert metrics["sugarcrepe_mean_of_groups_accuracy"] == pytest.approx(np.mean(groups))
    assert metrics["sugarcrepe_mean_of_sets_accuracy"] == pytest.approx(np.mean(list(expected.values())))
    assert metrics["sugarcrepe_ties"] == 16
    assert evaluator.primary_metric == "sugarcrepe_mean_of_groups_accuracy"


def test_defect_4_it_runs_in_a_process_of_its_own(folder):
    """The published script does not parse, and reads a global that is not there."""
    code = (
        "import sys, numpy as np; from unime_st.evaluation import SugarCrepeEvaluator as S\n"
        "class Model:\n"
        "    def encode(self, items, **_): return np.array([[1.0, len(str(item))] for item in items])\n"
        "print(S.from_folder(sys.argv[1], sys.argv[1] + '/images')(Model())['sugarcrepe_mean_of_groups_accuracy'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert 0 <= float(done.stdout) <= 1


def test_a_model_that_cannot_tell_is_wrong():
    class Constant(HashModel):
        def vector(self, item, prompt=""):
            return np.ones(self.dim)

    image = np.zeros((2, 2, 3), dtype=np.uint8)
    evaluator = SugarCrepeEvaluator({"own": [(image, "a", "b")]})
    metrics = evaluator(Constant())
    assert metrics == {
        "sugarcrepe_own_accuracy": 0.0,
        "sugarcrepe_mean_of_sets_accuracy": 0.0,
        "sugarcrepe_ties": 1,
    }
    assert evaluator.scores["own"].tied.tolist() == [True]


def test_own_groups():
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    sets = {"colour": [(image, "a", "b")], "size": [(image, "c", "d")], "count": [(image, "e", "f")]}
    evaluator = SugarCrepeEvaluator(sets, groups={"Attributes": ["colour", "size"]}, name="")
    metrics = evaluator(HashModel())
    assert metrics["Attributes_accuracy"] == (metrics["colour_accuracy"] + metrics["size_accuracy"]) / 2
    with pytest.raises(ValueError, match=r"names the sets \['sise'\]"):
        SugarCrepeEvaluator(sets, groups={"Attributes": ["colour", "sise"]})


def test_broken_input(folder):
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    for sets, message in (
        ({}, "No sets"),
        ({"a": []}, "'a' has no rows"),
        ({"a": [(image, "b")]}, "'a', row 0: 2 cells"),
    ):
        with pytest.raises(ValueError, match=message):
            SugarCrepeEvaluator(sets)
    bad = folder / "swap_obj.json"
    for entry, message in (({"filename": "1.png"}, "entry 0: KeyError"), ({"filename": "../x.png"}, "entry 0")):
        bad.write_text(json.dumps([{"caption": "a", **entry}]))
        with pytest.raises(ValueError, match=message):
            SugarCrepeEvaluator.from_folder(folder, folder / "images")
    bad.write_text(json.dumps([{"filename": "none.png", "caption": "a", "negative_caption": "b"}]))
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        SugarCrepeEvaluator.from_folder(folder, folder / "images")
    with pytest.raises(FileNotFoundError, match=r"no <set>\.json"):
        SugarCrepeEvaluator.from_folder(folder / "images", folder / "images")
