"""What is measured of a checkout's structure, on a made-up one; and what must hold of this one."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CIRCLES = []
"""All that there are: none. Do not add."""

LONG = (
    '''def long():
    """Two lines
    of docstring."""
    # a comment
    value = """a text,

    no docstring"""  # with a comment behind
'''
    + 40 * "    value += value\n"
    + "\n    return value\n"
)
FILES = {
    "src/unime_st/__init__.py": '"""The package."""\n',
    "src/unime_st/alone.py": "import os\nfrom unime_st.data import here\n\n\nclass A:\n    def b(self):\n"
    "        def c():\n            return os\n\n        return c\n",
    "src/unime_st/data/__init__.py": "from unime_st.data.here import here\n",
    "src/unime_st/data/here.py": LONG
    + "\n\nasync def here():\n    from unime_st.data.there import there\n    there()\n",
    "src/unime_st/data/there.py": "import unime_st.data.deep.far\n\n\ndef there():\n    pass\n",
    "src/unime_st/data/deep/far.py": "from ..here import long\n",
    "src/unime_st/typed.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from unime_st import untyped\n"
    "else:\n    import unime_st.alone\n",
    "src/unime_st/untyped.py": "from unime_st import typed\n",
    "examples/one.py": "import two\n",
    "examples/two.py": "from one import x\n",
    "benchmarks/speed.py": "import gpu\n",
    "benchmarks/gpu/run.py": "from work import y\nfrom speed import z\n",
    "benchmarks/gpu/work.py": "def f():\n    import run\n",
    "tests/test_all.py": "def f():\n" + 50 * "    f()\n",
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def structure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("structure")


@pytest.fixture
def found(structure, tmp_path):
    write(tmp_path, FILES)
    return structure.measured(tmp_path)


def test_lines_by_kind(found):
    lines = found["lines"]
    assert set(lines) == {"all", "benchmarks", "examples", "src/unime_st", "src/unime_st/data", "tests"}
    assert lines["tests"] == {"lines": 51, "docstring": 0, "comment": 0, "code": 51}
    # data: blank are 1 in `long`, 2 after it and 2 in `there`; the one in the text is code.
    assert lines["src/unime_st/data"] == {"lines": 61, "docstring": 2, "comment": 1, "code": 53}
    assert lines["src/unime_st"]["docstring"] == 1
    assert all(lines["all"][kind] == sum(lines[key][kind] for key in lines if key != "all") for kind in lines["all"])


def test_sizes_of_files_and_functions(found):
    assert found["files"] == {"number": 13, "p50": 1, "p90": 10, "max": 54, "largest": "src/unime_st/data/here.py"}
    long = "src/unime_st/data/here.py:long"
    assert found["functions"].pop("long") == [{"name": long, "lines": 47, "with_docstring": 49}]
    # A.b has 5 lines, A.b.c 2, there 2, here 3, f 2; tests are left out.
    assert found["functions"] == {"number": 6, "p50": 2, "p90": 47, "max": 47, "largest": long}


def test_imports_and_circles(found):
    package, examples, benchmarks = found["imports"].values()
    data = "unime_st.data"
    assert package["circles"] == [[f"{data}.deep.far", f"{data}.here", f"{data}.there"]]
    assert (package["modules"], package["imports"]) == (8, 7)
    assert examples == {"modules": 2, "imports": 2, "circles": [["one", "two"]]}
    assert benchmarks == {"modules": 3, "imports": 3, "circles": [["gpu.run", "gpu.work"]]}


def test_the_tables_hold_the_figures(structure, found):
    walk = {"files": 2, "hashes": {"blake2b": 1.5}, "order": ["a.py", "b.py"]}
    text = structure.tables({**found, "walks": {"encode": walk}})
    assert "| tests | 51 | 0 | 0 | 51 |" in text
    assert "| functions | 6 | 2 | 47 | 47 | src/unime_st/data/here.py:long |" in text
    assert "- circle: gpu.run, gpu.work" in text
    assert "| blake2b calls for each distinct input | 1.5 |" in text
    assert "2. b.py" in text


def test_an_empty_checkout(structure, tmp_path):
    found = structure.measured(tmp_path)
    assert found["functions"] == {"number": 0, "max": 0, "largest": "", "long": []}
    assert structure.tables(found)


def test_no_new_import_circles(structure):
    for root, imports in structure.measured(ROOT)["imports"].items():
        assert imports["circles"] == (CIRCLES if root == structure.PACKAGE else []), root


def test_the_kept_figures_name_their_commits(structure):
    kept = sorted((ROOT / "benchmarks" / "results" / "structure").glob("*.json"))
    assert kept
    for path in kept:
        figures = json.loads(path.read_text(encoding="utf-8"))
        assert len(figures["commit"]) == 7  # of a tree without changes
        assert structure.tables(figures)


WALKED = {
    "walked/__init__.py": "",
    "walked/top.py": "def top():\n    from walked.identity.ids import ids\n\n"
    "    return [ids(i) for i in range(3)], inner()\n\n\n"
    "def inner():\n    import made_up_model\n\n    made_up_model.forward()\n    return deeper(5)\n\n\n"
    "def deeper(n):\n    return n and deeper(n - 1)\n",
    "walked/identity/__init__.py": "",
    "walked/identity/ids.py": "import hashlib\n\n\ndef at_import():\n    pass\n\n\nat_import()\n\n\n"
    "def ids(i):\n    return hashlib.blake2b(b''.join(_parts())).digest()\n\n\n"
    "def _parts():\n    yield b'1'\n    yield b'2'\n",
    "transformers/models/made_up_model.py": "def forward():\n    pass\n",
}


def test_a_walk_tells_what_ran(monkeypatch, tmp_path):
    write(tmp_path, WALKED)
    for folder in (tmp_path / "transformers" / "models", ROOT / "benchmarks", tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    walk = importlib.import_module("structure_walks").Walk(tmp_path / "walked")
    walk.of(importlib.import_module("walked.top").top)
    assert sys.getprofile() is None
    assert walk.read(inputs=3) == {
        "files": 2,
        "functions": 5,
        "deepest_before_forward": 3,
        "depth_at_forward": 2,
        "distinct_inputs": 3,
        "hashes": {"_parts": 1.0, "blake2b": 1.0},
        "order": ["top.py", "identity/ids.py"],
    }
