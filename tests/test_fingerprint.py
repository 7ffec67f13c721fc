import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from unime_st.fingerprint import content_id, fingerprint, media_and_text


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def user(content):
    return {"role": "user", "content": content}


def test_one_text_in_its_many_forms_is_one_content():
    forms = ["a cat", {"text": "a cat"}, {"image": None, "text": "a cat"}, user("a cat"), [user("a cat")]]
    forms += [[user([{"type": "text", "text": "a cat"}])], [user(["a cat"])], ["a cat"]]
    assert len({fingerprint(form) for form in forms}) == 1
    assert len({content_id(form) for form in forms}) == 1


def test_different_contents_differ(picture):
    other = Image.fromarray(255 - np.asarray(picture))
    items = ["a", "b", "ab", ["a", "b"], ["b", "a"], picture, other, {"image": picture, "text": "a"}]
    items += [{"image": other, "text": "a"}, {"image": [picture, other]}, {"image": [other, picture]}]
    items += [
        picture.resize((7, 4)),
        picture.transpose(Image.Transpose.ROTATE_90),
        np.asarray(picture).reshape(7, 5, 3),
    ]
    items += [torch.zeros(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.bfloat16), torch.zeros(3, 4, 1), ""]
    assert len({fingerprint(item) for item in items}) == len(items)
    assert len({content_id(item) for item in items}) == len(items)


def test_encoded_images_are_known_by_the_file(tmp_path, picture):
    data = encoded(picture)
    first, copy = tmp_path / "a.png", tmp_path / "copy.png"
    first.write_bytes(data)
    copy.write_bytes(data)
    forms = [first, {"image": str(first)}, {"image": copy}, data, {"bytes": data, "path": "x.png"}, {"path": str(copy)}]
    forms.append([user([{"type": "image", "image": str(first)}])])
    assert len({fingerprint(form) for form in forms}) == 1
    names = {fingerprint({"image": str(path)}, read_files=False) for path in (first, copy)}
    assert len(names) == 2
    assert fingerprint({"image": "not there.png"}, read_files=False)


def test_a_file_that_changes_is_read_again(tmp_path, picture):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture))
    before = fingerprint(path)
    path.write_bytes(encoded(picture.rotate(90)))
    os.utime(path, ns=(1, 1))
    assert fingerprint(path) != before


def test_decoded_images_are_known_by_their_pixels(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.bmp")
    opened = [Image.open(tmp_path / name) for name in ("a.png", "a.bmp")]
    assert fingerprint(opened[0]) == fingerprint(opened[1]) == fingerprint(picture) == fingerprint(np.asarray(picture))
    red, blue = (
        Image.new("RGB", (4, 4), colour).convert("P", palette=Image.Palette.ADAPTIVE) for colour in ("red", "blue")
    )
    assert np.array_equal(np.asarray(red), np.asarray(blue))  # the same indices into different palettes
    assert fingerprint(red) != fingerprint(blue)


def test_instructions_count_for_the_fingerprint_only():
    chats = [[{"role": "system", "content": text}, user("a cat")] for text in ("one", "two")]
    assert len({fingerprint(chat) for chat in [*chats, "a cat"]}) == 3
    assert len({content_id(chat) for chat in [*chats, "a cat"]}) == 1
    reply = [user("a cat"), {"role": "assistant", "content": "a dog"}]
    assert content_id(reply) != content_id([user("a cat"), user("a dog")])


def test_content_ids_fit_an_int64_tensor():
    ids = [content_id(str(number)) for number in range(2000)]
    assert torch.tensor(ids).dtype == torch.int64
    assert min(ids) >= 0
    assert len(set(ids)) == 2000


def test_bad_inputs_say_what_is_allowed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.png"):
        fingerprint(tmp_path / "missing.png")
    with pytest.raises(TypeError, match="Cannot tell the content of a int"):
        fingerprint(3)
    with pytest.raises(TypeError, match=r"key\(s\) \['caption'\]"):
        fingerprint({"caption": "a cat"})


def test_long_arrays_in_mappings_are_told_apart():
    quiet, loud = np.zeros(16000), np.zeros(16000)
    loud[8000] = 5
    keys = {fingerprint({"audio": {"array": sound, "sampling_rate": 16000}}) for sound in (quiet, loud, quiet.copy())}
    keys |= {fingerprint({"audio": {"array": quiet, "sampling_rate": 8000}})}
    assert len(keys) == 3


def test_images_of_system_messages_are_content_and_their_texts_are_not():
    def row(text, color):
        parts = [{"type": "text", "text": text}, {"type": "image", "image": Image.new("RGB", (2, 2), color)}]
        return [{"role": "system", "content": parts}, {"role": "user", "content": "a cat"}]

    assert content_id(row("one word", "red")) == content_id(row("two words", "red"))
    assert content_id(row("one word", "red")) != content_id(row("one word", "green"))
    assert media_and_text(row("one word", "red"))[1] == "a cat"
