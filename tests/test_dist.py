"""What is released: complete, without the demo, tests and benchmarks, and it works in an environment of its own."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import unime_st

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check_dist():
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / ".ci" / "check_dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_wheel_and_source_install_and_encode(check_dist, tmp_path, capsys):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", tmp_path]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_dist.main(tmp_path / "dist")
    assert capsys.readouterr().out.count("complete, installs, encodes") == 2

    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"unime_st-{unime_st.__version__}.dist-info/METADATA").decode()
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert f"\nVersion: {unime_st.__version__}\n" in metadata
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tests/test_hub.py", "")
    with pytest.raises(ValueError, match=r"tests/test_hub.py should not be there"):
        check_dist.main(tmp_path / "dist")


def test_what_is_missing_or_strange_is_named(check_dist):
    version = unime_st.__version__
    names = [f"unime_st/{name}" for name in check_dist.NEEDED]
    check_dist.check_names(names, wheel=True)
    with pytest.raises(ValueError, match=r"unime_st/py.typed is missing"):
        check_dist.check_names(names[1:], wheel=True)
    for strange in ("emoji/pipeline.py", "examples/recipe.py", "unime_st/__pycache__/x.pyc"):
        with pytest.raises(ValueError, match=f"{strange} should not be there"):
            check_dist.check_names([*names, strange], wheel=True)
    source = [f"unime_st-{version}/src/{name}" for name in names]
    check_dist.check_names(source, wheel=False)
    with pytest.raises(ValueError, match="benchmarks should not be there"):
        check_dist.check_names([*source, f"unime_st-{version}/benchmarks/bench.py"], wheel=False)


def test_the_version_has_one_place(check_dist):
    version = unime_st.__version__
    assert check_dist.version() == version
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = {attr = "unime_st.__version__"}' in project
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", version)
