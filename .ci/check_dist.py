"""Look at a wheel and a source distribution, install each into an environment of its own, and use it there.

    python .ci/check_dist.py dist

The environment has nothing but the distribution; the libraries that it depends on are those of the one that runs this,
seen through a path. So it is shown that the files are all there and work, not that the dependencies can be resolved.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("py.typed", "__init__.py", "model_card_template.md", "evaluation/published.json", "serve/page/index.html")
SMOKE = """
import sys
from importlib.metadata import version
from pathlib import Path

root, tests, wanted = sys.argv[1:]
import unime_st

assert Path(unime_st.__file__).is_relative_to(sys.prefix), unime_st.__file__
assert unime_st.__version__ == version("unime_st") == wanted
assert Path(unime_st.__file__).with_name("py.typed").is_file()
sys.path.append(tests)
from tiny import picture, tiny_backbone

model = unime_st.build_encoder(tiny_backbone("qwen2_vl", Path(root, "backbone")), device="cpu")
inputs = ["a red bus", picture("red"), {"image": picture("red"), "text": "what colour?"}]
embeddings = model.encode(inputs)
unime_st.export_encoder(model, Path(root, "encoder"))
again = unime_st.load_encoder(Path(root, "encoder"), device="cpu").encode(inputs)
assert embeddings.shape == (3, 32)
assert abs(again - embeddings).max() < 1e-5
"""


def version() -> str:
    """The version, from the one place that has it."""
    tree = ast.parse((ROOT / "src/unime_st/__init__.py").read_text(encoding="utf-8"))
    found = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    return ast.literal_eval(found[0].value)


def check_names(names: list[str], *, wheel: bool) -> None:
    """Refuse an archive in which something is missing, or has no place."""
    prefix = "unime_st/" if wheel else f"unime_st-{version()}/src/unime_st/"
    for name in NEEDED:
        if prefix + name not in names:
            raise ValueError(f"{prefix}{name} is missing")
    if wheel:
        allowed = ("unime_st/", f"unime_st-{version()}.dist-info/")
        strange = [name for name in names if not name.startswith(allowed)]
    else:
        tops = {name.split("/")[1] for name in names if name.count("/") > 0}
        strange = sorted(tops & {"tests", "benchmarks", "examples", "docs", ".ci", "build", "dist"})
    strange += [name for name in names if "__pycache__" in name or "emoji" in name]
    if strange:
        raise ValueError(f"{', '.join(strange[:5])} should not be there")


def as_wheel(file: Path, folder: Path) -> Path:
    """A wheel as it is; that of a source distribution is built with this environment's setuptools."""
    if file.suffix == ".whl":
        return file
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, file)
    return next(folder.glob("*.whl"))


def use(wheel: Path, folder: Path) -> None:
    """Install it, and encode, save and load with it."""
    clean = folder / "clean"
    venv.create(clean, with_pip=False)
    python = clean / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A folder that a .pth file names is searched for modules; its own .pth files (editable packages) are not read.
    Path(own, "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    run(python, "-I", "-c", SMOKE, folder, ROOT / "tests", version(), cwd=folder)
    said = run(python, "-I", clean / "bin" / "unime", "--help", cwd=folder)
    for command in ("train", "encode", "search", "serve"):
        if command not in said:
            raise ValueError(f"`unime --help` does not name {command}: {said}")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints, without the caller's path of modules; its errors are shown."""
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def main(folder: Path) -> None:
    """Check all that is there, which must be one of each kind."""
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sources) != 1:
        raise ValueError(
            f"{folder} holds {len(wheels)} wheels and {len(sources)} source distributions, not one of each"
        )
    for file in (*wheels, *sources):
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                check_names(archive.namelist(), wheel=True)
        else:
            with tarfile.open(file) as archive:
                check_names(archive.getnames(), wheel=False)
        with tempfile.TemporaryDirectory() as scratch:
            use(as_wheel(file, Path(scratch)), Path(scratch))
        sys.stdout.write(f"{file}: complete, installs, encodes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
