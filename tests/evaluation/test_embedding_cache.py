import numpy as np
import pytest
import torch
from evaluation_fakes import HashModel
from PIL import Image
from torch import nn

from unime_st.evaluation import BrokenItemError, EmbeddingCache, encode_distinct, model_fingerprint
from unime_st.evaluation.encoding import encode_indexed

ITEMS = [f"text {number % 40}" for number in range(100)]


def test_each_distinct_thing_is_encoded_once_and_aligned():
    model = HashModel()
    embeddings = encode_distinct(model, ITEMS)
    assert sorted(model.encoded) == sorted(set(ITEMS))
    assert embeddings.shape == (100, 6)
    np.testing.assert_array_equal(embeddings, HashModel().encode(ITEMS))


def test_a_second_run_encodes_nothing_and_gives_the_same_numbers(tmp_path):
    first = encode_distinct(HashModel(), ITEMS, cache=tmp_path)
    model = HashModel()
    again = encode_distinct(model, ITEMS[::-1], cache=EmbeddingCache(tmp_path))
    assert model.encoded == []
    np.testing.assert_array_equal(again, first[::-1])


def test_new_items_only_are_encoded(tmp_path):
    encode_distinct(HashModel(), ITEMS, cache=tmp_path)
    model = HashModel()
    encode_distinct(model, [*ITEMS, "new"], cache=tmp_path)
    assert model.encoded == ["new"]


def test_changed_weights_prompt_and_dimension_miss(tmp_path):
    encode_distinct(HashModel(), ITEMS, cache=tmp_path)
    changed = HashModel()
    changed.weight.data[0, 0] += 1e-6  # behind autograd's back: no version counter sees it
    expected = changed.encode(ITEMS)
    changed.encoded.clear()
    np.testing.assert_array_equal(encode_distinct(changed, ITEMS, cache=tmp_path), expected)
    assert len(changed.encoded) == 40

    for arguments in ({"prompt": "Find: "}, {"prompt": "Look: "}):
        model = HashModel()
        encode_distinct(model, ITEMS, cache=tmp_path, **arguments)
        assert len(model.encoded) == 40
    model = HashModel()
    encode_distinct(model, ITEMS, cache=tmp_path, prompt_name="query")  # the same prompt by its name: known
    assert model.encoded == []
    model.truncate_dim = 3
    encode_distinct(model, ITEMS, cache=tmp_path)
    assert len(model.encoded) == 40
    with pytest.raises(ValueError, match=r"prompt_name='other'.*\['query'\]"):
        encode_distinct(model, ITEMS, cache=tmp_path, prompt_name="other")


def test_a_killed_run_goes_on(tmp_path):
    items = [f"text {number}" for number in range(100)]
    killed = HashModel(fail_after=48)
    with pytest.raises(KeyboardInterrupt):
        encode_distinct(killed, items, cache=tmp_path, batch_size=2)
    assert len(killed.encoded) == 48
    model = HashModel()
    embeddings = encode_distinct(model, items, cache=tmp_path, batch_size=2)
    assert sorted(model.encoded + killed.encoded) == sorted(items)
    np.testing.assert_array_equal(embeddings, HashModel().encode(items))
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".partial"]


def test_a_damaged_shard_is_made_again(tmp_path, caplog):
    first = encode_distinct(HashModel(), ITEMS, cache=tmp_path)
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    model = HashModel()
    np.testing.assert_array_equal(encode_distinct(model, ITEMS, cache=tmp_path), first)
    assert len(model.encoded) == 40
    assert "cannot be read" in caplog.text


def test_clear_removes_sections_only(tmp_path):
    encode_distinct(HashModel(), ITEMS, cache=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    EmbeddingCache(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_cache_refuses_what_would_poison_it(tmp_path):
    section = EmbeddingCache(tmp_path).section(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="NaN"):
        section.add(["00"], np.array([[np.nan]]))
    with pytest.raises(ValueError, match="1 embeddings for 2"):
        section.add(["00", "01"], np.ones((1, 2)))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_weights_there_is_no_cache(tmp_path):
    class Bare:
        def encode(self, items, **kwargs):
            return np.ones((len(items), 2))

    assert encode_distinct(Bare(), ["a"]).shape == (1, 2)
    with pytest.raises(TypeError, match="without a cache"):
        encode_distinct(Bare(), ["a"], cache=tmp_path)


def test_nan_is_named():
    class Diverged(HashModel):
        def vector(self, item, prompt=""):
            return np.full(self.dim, np.nan) if item == "text 7" else super().vector(item, prompt)

    with pytest.raises(ValueError, match=r"NaN or infinity for item 7 .*'text 7'"):
        encode_distinct(Diverged(), ITEMS)


def picture(path, colour):
    Image.new("RGB", (8, 8), colour).save(path)
    return path


class ImageModel(HashModel):
    def vector(self, item, prompt=""):
        if isinstance(item, dict):
            with Image.open(item["image"]) as image:
                return super().vector(image.convert("RGB").tobytes())
        return super().vector(item)


def test_broken_images_are_named_or_reported(tmp_path):
    good, copy = picture(tmp_path / "a.png", "red"), picture(tmp_path / "copy.png", "red")
    torn = tmp_path / "torn.png"
    torn.write_bytes(good.read_bytes()[:40])
    items = ["text", *({"image": str(path)} for path in (good, torn, tmp_path / "none.png", copy, torn))]

    model = ImageModel()
    embeddings, index, broken = encode_indexed(model, items, on_error="report")
    assert sorted(broken) == [2, 3, 5]
    assert "none.png" in broken[3]
    assert index.tolist()[2:4] == [-1, -1]
    assert index[1] == index[4]
    assert embeddings.shape == (2, 6)

    with pytest.raises(BrokenItemError, match=r"Item 3 .*none\.png") as missing:
        encode_distinct(model, items)
    assert missing.value.position == 3
    with pytest.raises(BrokenItemError, match=r"Item 2 .*(truncated|identify|broken)"):
        encode_distinct(model, [*items[:3], *items[4:]])


def test_nothing_readable_and_nothing_at_all(tmp_path):
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"no picture")
    embeddings, index, broken = encode_indexed(ImageModel(), [{"image": str(torn)}], on_error="report", cache=tmp_path)
    assert embeddings.shape == (0, 0)
    assert index.tolist() == [-1]
    assert list(broken) == [0]
    with pytest.raises(ValueError, match="nothing to encode"):
        encode_distinct(HashModel(), [])


def test_an_error_that_is_no_items_fault_passes_through():
    class Faulty(HashModel):
        def encode(self, items, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            raise ValueError("shapes do not match")

    for on_error in ("raise", "report"):
        model = Faulty()
        with pytest.raises(ValueError, match=r"^shapes do not match$"):
            encode_indexed(model, ITEMS, on_error=on_error)
        assert model.calls == 1


def test_fingerprint_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    before = model_fingerprint(model)
    assert before == model_fingerprint(model)
    assert len(before) == 64
    model(torch.ones(2, 3, dtype=torch.bfloat16))  # running statistics are part of the model
    assert before != model_fingerprint(model)
    assert model_fingerprint(nn.Linear(1, 1, bias=False).float()) != model_fingerprint(nn.Linear(1, 1).half())
