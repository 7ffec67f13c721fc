import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from evaluation_fakes import HashModel
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

from unime_st.embedding import cache as cache_module
from unime_st.embedding.cache import CacheSection
from unime_st.embedding.distinct import encode_indexed
from unime_st.embedding.sections import remove_section
from unime_st.embedding.shards import key_array, packed
from unime_st.evaluation import BrokenItemError, EmbeddingCache, encode_distinct, model_fingerprint
from unime_st.files import checksum

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
    with pytest.raises(ValueError, match="differ in length"):
        section.add(["00ff11", "aa"], np.ones((2, 2)))
    for shape in ((1,), (1, 0), (1, 2, 2)):
        with pytest.raises(ValueError, match="must be"):
            section.add(["00"], np.ones(shape))
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
        assert model.calls < 2 * 40  # each distinct item was tried alone once


def test_fingerprint_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    before = model_fingerprint(model)
    assert before == model_fingerprint(model)
    assert len(before) == 64
    model(torch.ones(2, 3, dtype=torch.bfloat16))  # running statistics are part of the model
    assert before != model_fingerprint(model)
    assert model_fingerprint(nn.Linear(1, 1, bias=False).float()) != model_fingerprint(nn.Linear(1, 1).half())


def filled(cache, prompt, count=50, dim=64):
    """A section of so many embeddings."""
    section = cache.section(HashModel(), prompt=prompt)
    rng = np.random.default_rng(0)
    section.add([f"{number:032x}" for number in range(count)], rng.normal(size=(count, dim)).astype(np.float32))
    return section


def test_info_and_clear(tmp_path):
    cache = EmbeddingCache(tmp_path)
    filled(cache, "one")
    other = cache.section(torch.nn.Linear(2, 2), settings={"image_size": 336})
    other.add(["00ff"], np.ones((1, 3), np.float32))
    os.utime(other.folder / "section.json", (1000, 1000))
    first, second = cache.info()
    assert (first.prompt, first.items, first.settings) == ("one", 50, {})
    assert (second.items, second.settings, second.last_used) == (1, {"image_size": 336}, 1000)
    assert first.num_bytes == sum(path.stat().st_size for path in first.folder.iterdir()) > 50 * 64 * 4
    assert cache.clear(model="nothing") == 0
    assert cache.clear(unused_for=3600) == second.num_bytes
    assert [info.prompt for info in cache.info()] == ["one"]
    assert cache.clear(model=first.model[:10]) == first.num_bytes
    assert not cache.info()


def test_the_commands(tmp_path, capsys):
    from unime_st.evaluation.__main__ import main

    filled(EmbeddingCache(tmp_path), "find: ")
    main(["cache", "info", str(tmp_path)])
    told = capsys.readouterr().out
    assert "50 embeddings" in told
    assert "prompt 'find: '" in told
    assert "1 sections" in told
    main(["cache", "clear", str(tmp_path), "--unused-for", "1"])
    assert len(EmbeddingCache(tmp_path).info()) == 1
    main(["cache", "clear", str(tmp_path)])
    assert "freed 0.0 MB" in capsys.readouterr().out
    assert not EmbeddingCache(tmp_path).info()
    with pytest.raises(SystemExit):
        main(["cache", "info", str(tmp_path / "none")])


def test_a_bound_drops_what_was_used_least_recently(tmp_path, caplog):
    size = EmbeddingCache(tmp_path / "measure")
    filled(size, "a")
    one = size.info()[0].num_bytes
    cache = EmbeddingCache(tmp_path / "cache", max_bytes=int(2.5 * one))
    for age, prompt in ((300, "a"), (200, "b")):
        section = filled(cache, prompt)
        stamp = time.time() - age
        os.utime(section.folder / "section.json", (stamp, stamp))
    cache.section(HashModel(), prompt="a")  # used again: now "b" is the older
    filled(cache, "c")
    assert sorted(info.prompt for info in cache.info()) == ["a", "c"]
    small = EmbeddingCache(tmp_path / "small", max_bytes=one // 2)
    section = filled(small, "a")
    assert not small.info()
    assert "not kept" in caplog.text
    assert section.get(["0" * 32])[0] is not None  # in memory still
    with pytest.raises(ValueError, match="max_bytes=0"):
        EmbeddingCache(tmp_path, max_bytes=0)


def test_many_shards_become_one(tmp_path):
    cache = EmbeddingCache(tmp_path)
    section = cache.section(HashModel())
    rows = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
    for number, row in enumerate(rows):
        section.add([f"{number:032x}"], row[None])
    assert len(list(section.folder.glob("*.safetensors"))) == 80
    again = cache.section(HashModel())
    assert len(list(section.folder.glob("*.safetensors"))) == 1
    for opened in (again, cache.section(HashModel())):
        np.testing.assert_array_equal(np.stack(opened.get([f"{number:032x}" for number in range(80)])), rows)


def test_a_reader_beside_a_merging_process_misses_nothing(tmp_path, monkeypatch):
    """The shards it has listed are merged before it opens them."""
    cache = EmbeddingCache(tmp_path)
    section = cache.section(HashModel())
    for number in range(70):
        section.add([f"{number:032x}"], np.full((1, 2), number, np.float32))
    plain, merged = cache_module.open_shard, []

    def merging_first(path):
        if not merged:
            merged.append(True)
            cache.section(HashModel())  # the other process
        return plain(path)

    monkeypatch.setattr(cache_module, "open_shard", merging_first)
    assert len(cache.section(HashModel())) == 70


def test_a_section_whose_shards_are_merged_or_deleted_meanwhile_serves_what_is_left(tmp_path):
    cache = EmbeddingCache(tmp_path)
    section = cache.section(HashModel())
    rows = np.random.default_rng(0).normal(size=(70, 4)).astype(np.float32)
    for number, row in enumerate(rows):
        section.add([f"{number:032x}"], row[None])
    cache.section(HashModel())  # merges
    assert len(list(section.folder.glob("*.safetensors"))) == 1
    np.testing.assert_array_equal(np.stack(section.get(keys_of(70))), rows)
    assert len(section) == 70
    remove_section(section.folder)
    assert section.get(keys_of(70)) == [None] * 70
    assert "0" * 32 not in section
    section.add(keys_of(1), rows[:1])
    np.testing.assert_array_equal(section.get(keys_of(1))[0], rows[0])


def test_a_section_that_was_opened_amid_a_merge_serves_what_was_merged(tmp_path):
    cache = EmbeddingCache(tmp_path)
    section = cache.section(HashModel())
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for number, row in enumerate(rows):
        section.add(keys_of(3)[number : number + 1], row[None])
    small = list(section.folder.glob("*.safetensors"))
    (section.folder / f"{'f' * 32}.safetensors").write_bytes(packed(key_array(keys_of(3)), rows))
    opened = cache.section(HashModel())
    for file in small:
        file.unlink()
    np.testing.assert_array_equal(np.stack(opened.get(keys_of(3))), rows)


def test_shards_of_an_earlier_version_are_served(tmp_path):
    """As they were written: with both tensors in either order, of whatever size."""
    section = filled(EmbeddingCache(tmp_path), "one", count=1)
    keys, rows = np.arange(48, dtype=np.uint8).reshape(3, 16), np.arange(6, dtype=np.float32).reshape(3, 2)
    told = {"checksum": checksum(keys, rows)}
    save_file({"embeddings": rows, "keys": keys}, section.folder / "old.safetensors", told)
    plain = (section.folder / "old.safetensors").read_bytes()
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    header["keys"]["data_offsets"], header["embeddings"]["data_offsets"] = [0, 48], [48, 72]
    keys[:, 0] += 100
    header["__metadata__"] = {"checksum": checksum(keys, rows)}
    turned = json.dumps(header).encode()
    content = len(turned).to_bytes(8, "little") + turned + keys.tobytes() + rows.tobytes()
    (section.folder / "turned.safetensors").write_bytes(content)
    again = EmbeddingCache(tmp_path).section(HashModel(), prompt="one")
    assert len(again) == 7
    np.testing.assert_array_equal(np.stack(again.get([bytes(key).hex() for key in keys])), rows)
    keys[:, 0] -= 100
    np.testing.assert_array_equal(np.stack(again.get([bytes(key).hex() for key in keys])), rows)


LARGE = '''
import resource, sys
from pathlib import Path
import numpy as np
from unime_st.embedding.cache import CacheSection, EmbeddingCache

def told(name):
    """Bytes; the peak of `getrusage` would be that of the process before it was this one."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10

folder, wanted = Path(sys.argv[1]), [f"{number:032x}" for number in range(0, 65536, 700)]
before = told("VmHWM")
limit = told("VmData") + (160 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
section = CacheSection(folder, {}, EmbeddingCache(folder.parent))
rows = section.get(wanted)
assert [row[0] for row in rows] == list(range(0, 65536, 700))
assert len(section) == 65536
print((told("VmHWM") - before) >> 20)
'''


@pytest.mark.parametrize("shards", [2, 128])
def test_a_section_may_be_larger_than_memory(tmp_path, shards):
    """256 MB in few shards, or in many that are merged, in a process that may take 160."""
    section = CacheSection(tmp_path / "section", {}, EmbeddingCache(tmp_path))
    step = 65536 // shards
    for start in range(0, 65536, step):
        rows = np.repeat(np.arange(start, start + step, dtype=np.float32)[:, None], 1024, axis=1)
        section.add([f"{number:032x}" for number in range(start, start + step)], rows)
    code = [sys.executable, "-c", LARGE, str(section.folder)]
    done = subprocess.run(code, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (40 if shards == 2 else 140)
    assert len(list(section.folder.glob("*.safetensors"))) == (2 if shards == 2 else 8)


def write_many(folder, which, count):
    """In a process of its own."""
    section = EmbeddingCache(folder).section(HashModel())
    for number in range(count):
        section.add([f"{which:02x}{number:030x}"], np.full((1, 3), number, np.float32))


def test_several_processes_write_and_nothing_is_lost(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(tmp_path, which, 40)) for which in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    section = EmbeddingCache(tmp_path).section(HashModel())
    assert len(section) == 80
    assert section.get([f"01{39:030x}"])[0].tolist() == [39, 39, 39]


def test_a_killed_writer_loses_at_most_what_it_was_writing(tmp_path):
    writer = multiprocessing.get_context("spawn").Process(target=write_many, args=(tmp_path, 0, 100_000))
    writer.start()
    while len(list(tmp_path.glob("*/*.safetensors"))) < 20:
        time.sleep(0.01)
    writer.kill()
    writer.join()
    before = len(list(tmp_path.glob("*/*.safetensors")))
    section = EmbeddingCache(tmp_path).section(HashModel())
    assert len(section) == before >= 20
    assert [row[0] for row in section.get([f"00{number:030x}" for number in range(before)])] == list(range(before))


def keys_of(count):
    return [f"{number:032x}" for number in range(count)]


@pytest.fixture
def afresh(monkeypatch):
    """As in a process that has said nothing yet."""
    monkeypatch.setattr(cache_module, "_told", set())


def test_no_flipped_or_missing_byte_is_served(tmp_path):
    section = filled(EmbeddingCache(tmp_path), "one", count=6, dim=5)
    expected = np.stack(section.get(keys_of(6)))
    (shard,) = section.folder.glob("*.safetensors")
    good, lost = shard.read_bytes(), 0
    harmed = [good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :] for place in range(len(good))]
    harmed += [good[:length] for length in range(0, len(good), 9)]
    for content in harmed:
        shard.write_bytes(content)
        rows = EmbeddingCache(tmp_path).section(HashModel(), prompt="one").get(keys_of(6))
        lost += rows[0] is None
        assert rows == [None] * 6 or np.array_equal(np.stack(rows), expected)
        assert shard.exists() == (rows[0] is not None)
    assert lost > len(harmed) - 5  # a few bits of the header say nothing


@pytest.mark.parametrize(
    "tensors",
    [
        {"keys": np.zeros((2, 16), np.uint8), "embeddings": np.ones((3, 4), np.float32)},
        {"names": np.zeros((2, 16), np.uint8), "embeddings": np.ones((2, 4), np.float32)},
        {"keys": np.zeros((2, 16), np.uint8)},
        {"keys": np.zeros((2, 16), np.uint8), "embeddings": np.ones((2, 4), np.float32)},
    ],
    ids=["lengths differ", "another name", "half of it", "no checksum"],
)
def test_a_shard_of_another_kind_is_named_and_deleted(tmp_path, caplog, tensors):
    section = filled(EmbeddingCache(tmp_path), "one")
    save_file(tensors, section.folder / "zz.safetensors")
    assert len(EmbeddingCache(tmp_path).section(HashModel(), prompt="one")) == 50
    assert "zz.safetensors cannot be read" in caplog.text
    assert not (section.folder / "zz.safetensors").exists()


@pytest.mark.parametrize("content", ["[]", '{"model"', "", '{"settings": []}', "\xff"])
def test_a_damaged_note_is_named_and_written_anew(tmp_path, caplog, content):
    section = filled(EmbeddingCache(tmp_path), "one")
    marker = section.folder / "section.json"
    good = marker.read_text()
    marker.write_bytes(content.encode("latin-1"))
    (info,) = EmbeddingCache(tmp_path).info()
    assert (info.model, info.items) == ("", 50)
    assert f"{marker} is damaged" in caplog.text
    assert len(EmbeddingCache(tmp_path).section(HashModel(), prompt="one")) == 50
    assert marker.read_text() == good
    marker.unlink()
    EmbeddingCache(tmp_path).section(HashModel(), prompt="one")
    assert marker.read_text() == good


def half_written(folder):
    """What a process that was killed leaves, by its name."""
    code = (
        "import os, signal, sys; from pathlib import Path; from unime_st.files import write_atomically\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]) / 'a.safetensors', 'half' * 1000)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    (left,) = folder.glob(".*.partial")
    return left


def test_what_killed_processes_left_goes_and_counts_until_then(tmp_path):
    section = filled(EmbeddingCache(tmp_path), "one")
    left = half_written(section.folder)
    (info,) = EmbeddingCache(tmp_path).info()
    assert info.num_bytes == sum(path.stat().st_size for path in section.folder.iterdir())
    evicted = tmp_path / ".section.1.evicted"
    evicted.mkdir()
    (evicted / "a.safetensors").write_text("half deleted")
    assert len(EmbeddingCache(tmp_path).info()) == 1
    EmbeddingCache(tmp_path).section(HashModel(), prompt="one")
    assert not left.exists()
    assert not evicted.exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_where_nothing_can_be_written_what_is_there_is_served(tmp_path, monkeypatch, caplog, afresh, code):
    first = encode_distinct(HashModel(), ITEMS, cache=tmp_path)
    EmbeddingCache(tmp_path)

    def refuses(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache_module, "write_atomically", refuses)
    monkeypatch.setattr(cache_module.os, "utime", refuses)
    monkeypatch.setattr("pathlib.Path.unlink", refuses)
    model = HashModel()
    np.testing.assert_array_equal(encode_distinct(model, ITEMS, cache=tmp_path), first)
    assert model.encoded == []
    assert not caplog.text
    for new in ("new", "newer"):
        encode_distinct(model, [*ITEMS, new], cache=tmp_path, batch_size=1)
    assert model.encoded == ["new", "newer"]
    assert caplog.text.count("cannot be written") == 1
    assert str(tmp_path) in caplog.text
    assert "give another folder" in caplog.text


def test_many_shards_stay_when_they_cannot_be_merged(tmp_path, monkeypatch, afresh):
    section = EmbeddingCache(tmp_path).section(HashModel())
    for number in range(70):
        section.add([f"{number:032x}"], np.full((1, 2), number, np.float32))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "write_atomically", full)
    assert len(EmbeddingCache(tmp_path).section(HashModel())) == 70
    assert len(list(section.folder.glob("*.safetensors"))) == 70


@pytest.mark.parametrize("how", ["cleared", "gone"])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_section_deleted_while_it_is_written_is_made_again(tmp_path, monkeypatch, times, how):
    """Another process makes room at the worst moment: before the rename."""
    cache = EmbeddingCache(tmp_path)
    section = filled(cache, "one", count=3)
    real, left = os.fsync, [times]

    def evicting(file):
        real(file)
        if left[0]:
            left[0] -= 1
            cache.clear() if how == "cleared" else remove_section(section.folder)

    monkeypatch.setattr(os, "fsync", evicting)
    section.add(["f" * 32], np.ones((1, 64), np.float32))
    monkeypatch.undo()
    assert left[0] < times
    assert section.get(["f" * 32])[0].tolist() == [1] * 64
    section.add(["e" * 32], np.zeros((1, 64), np.float32))
    again = EmbeddingCache(tmp_path).section(HashModel(), prompt="one")
    assert again.get(["e" * 32])[0].tolist() == [0] * 64
    assert how == "gone" or again.get(["f" * 32])[0].tolist() == [1] * 64
    assert again.get(keys_of(1)) == [None]
    assert [info.prompt for info in cache.info()] == ["one"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".evicted")]


def fill_and_evict(folder, which, failed):
    """In a process of its own, with room for less than both write."""
    try:
        cache = EmbeddingCache(folder, max_bytes=60_000)
        for number in range(60):
            section = cache.section(HashModel(), prompt=f"{which} {number % 3}")
            section.get(keys_of(5))
            section.add([f"{number:032x}"], np.full((1, 500), number, np.float32))
            for key, row in ((key, row) for key, row in zip(keys_of(60), section.get(keys_of(60)), strict=True) if
                             row is not None):  # fmt: skip
                assert row.tolist() == [int(key, 16)] * 500
    except BaseException as error:
        failed.put(repr(error))
        raise


def test_processes_that_make_room_for_themselves_kill_no_others(tmp_path):
    context = multiprocessing.get_context("fork")  # no time for imports: they start together
    failed = context.Queue()
    workers = [context.Process(target=fill_and_evict, args=(tmp_path, which, failed)) for which in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3, failed.get()
    assert 0 < sum(info.num_bytes for info in EmbeddingCache(tmp_path).info()) < 3 * 60_000


def test_sections_of_before_are_named_and_can_be_cleared(tmp_path, caplog, capsys, afresh):
    from unime_st.evaluation.__main__ import main

    filled(EmbeddingCache(tmp_path), "one")
    assert not caplog.text
    old = tmp_path / ("0" * 32)
    old.mkdir()
    (old / "section.json").write_text(json.dumps({"model": "ab" * 32, "prompt": "old", "settings": {}}))
    save_file({"keys": np.zeros((2, 16), np.uint8), "embeddings": np.ones((2, 4), np.float32)}, old / "a.safetensors")
    cache_module._told.clear()
    for _ in range(2):
        EmbeddingCache(tmp_path).section(HashModel(), prompt="one")
    assert caplog.text.count("1 sections of") == 1
    assert "cache clear --outdated" in caplog.text
    assert {info.prompt: info.outdated for info in EmbeddingCache(tmp_path).info()} == {"one": False, "old": True}
    main(["cache", "info", str(tmp_path)])
    told = capsys.readouterr().out.splitlines()
    assert ["earlier version" in line for line in sorted(told, key=lambda line: "'old'" in line)][-1]
    assert sum("earlier version" in line for line in told) == 1
    main(["cache", "clear", "--outdated", str(tmp_path)])
    assert [info.prompt for info in EmbeddingCache(tmp_path).info()] == ["one"]
