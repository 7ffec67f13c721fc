"""What a path in data may lead to: regular files below the folder."""

import os
import socket

import pytest

from tiny import picture
from unime_st.paths import resolve_below


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    picture("red").save(tmp_path / "root" / "a" / "red.png")
    picture("green").save(tmp_path / "secret.png")
    return tmp_path / "root"


def leading_out(folder):
    secret = folder.parent / "secret.png"
    (folder / "link.png").symlink_to(secret)
    (folder / "twice.png").symlink_to("link.png")
    (folder / "up").symlink_to("..")
    beside = folder.parent / "root-2"  # begins alike
    beside.mkdir()
    climbing = ["../secret.png", "a/../../secret.png", "up/secret.png", "link.png", "twice.png", "a/./../../secret.png"]
    absolute = [str(secret), "/etc/hostname", "//etc/hostname", f"{beside}/x.png"]
    windows = ["..\\secret.png", "a\\..\\..\\secret.png", "C:\\secret.png", "C:secret.png", "c:/secret.png"]
    return [*climbing, *absolute, *windows, "\\secret.png", "\\\\server\\share\\x.png"]


def test_what_leads_out_is_refused_whether_it_is_there_or_not(folder):
    for path in leading_out(folder):
        for must_exist in (True, False):
            with pytest.raises(ValueError, match="leaves the image folder"):
                resolve_below(folder, path, must_exist=must_exist)


def no_files(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "broken.png").symlink_to("nothing.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.png"))
    special = ["pipe.png", "socket.png", "circle.png", "broken.png", "a", ".", "", "a/red.png/x.png", "a/none.png"]
    impossible = ["x" * 300 + ".png", "x/" * 3000 + "x.png", "a\0.png", "a\ud800.png"]
    return [*special, *impossible, "http://host/a.png", "zip://a.png::a.zip", "a.zip!/a.png"]


def test_what_is_no_file_is_missing(folder):
    for path in no_files(folder):
        with pytest.raises(FileNotFoundError, match=r"There is no image .* below .* `image_root`") as caught:
            resolve_below(folder, path)
        assert len(str(caught.value)) < 600


def test_what_is_below_is_found(folder):
    there = (folder / "a" / "red.png").resolve()
    (folder / "link.png").symlink_to("a/red.png")
    (folder.parent / "other").symlink_to(folder)
    for root in (folder, folder.parent / "other", os.path.relpath(folder)):
        for path in ("a/red.png", "./a//red.png", "link.png", str(there), folder / "a" / "red.png"):
            assert resolve_below(root, path) == there
    assert resolve_below(folder, "b.png", must_exist=False) == folder.resolve() / "b.png"


def test_snapshots_of_the_hub_are_links_to_blobs(tmp_path):
    """As `snapshot_download` lays them out; a link from there to elsewhere is none of them."""
    blobs, images = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1234" / "images"
    blobs.mkdir(parents=True)
    images.mkdir(parents=True)
    picture("red").save(blobs / "0123.png")
    (images / "red.png").symlink_to("../../../blobs/0123.png")
    assert resolve_below(images, "red.png") == (blobs / "0123.png").resolve()
    picture("green").save(tmp_path / "secret.png")
    (images / "green.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="leaves the image folder"):
        resolve_below(images, "green.png")
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leaves the image folder"):
        resolve_below(images, "red.png")


def test_a_folder_that_may_not_be_read(folder):
    """Root may read everything, so another user looks."""
    (folder / "a").chmod(0)
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            if os.geteuid() == 0:
                for parent in (folder, *folder.parents[:3]):
                    parent.chmod(0o755)
                os.seteuid(65534)
            resolve_below(folder, "a/red.png")
        except BaseException as error:  # noqa: BLE001 what a child says is compared below
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as told:
        assert "FileNotFoundError: There is no image 'a/red.png'" in (text := told.read())
    assert "(Permission denied)" in text
    (folder / "a").chmod(0o755)


def test_words_for_other_files(folder):
    with pytest.raises(ValueError, match=r"Text path '\.\./x\.txt' leaves the text folder .* copy the text inside"):
        resolve_below(folder, "../x.txt", what="text")
    with pytest.raises(FileNotFoundError, match=r"There is no text 'x\.txt' below .*\. Check the folder"):
        resolve_below(folder, "x.txt", what="text")
