"""What is exported is encoded by stock sentence-transformers in a virtual environment that has no unime_st."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from tiny import FAMILIES, picture
from unime_st import build_encoder, export_encoder

STOCK = """
import importlib.util, json, sys
import numpy as np

assert importlib.util.find_spec("unime_st") is None, "the environment has unime_st"
from sentence_transformers import SentenceTransformer

root = sys.argv[1]
for family in json.loads(sys.argv[2]):
    model = SentenceTransformer(f"{root}/{family}", device="cpu")
    items = ["a red bus", f"{root}/picture.png", {"image": f"{root}/picture.png", "text": "what colour?"}]
    np.save(f"{root}/{family}.npy", np.concatenate([model.encode([item]) for item in items]))
"""


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    """A virtual environment that sees the packages of this one, editable installations aside."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    question = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(question, check=True, capture_output=True, text=True).stdout.strip()
    # A folder named in a .pth file is searched for modules, but the .pth files inside it are not read.
    Path(own, "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


@pytest.mark.slow
def test_every_family_is_encoded_without_this_package(clean_python, backbone, tmp_path):
    picture("purple").save(tmp_path / "picture.png")
    items = [
        "a red bus",
        str(tmp_path / "picture.png"),
        {"image": str(tmp_path / "picture.png"), "text": "what colour?"},
    ]
    expected = {}
    for family in FAMILIES:
        model = build_encoder(backbone(family), device="cpu")
        export_encoder(model, tmp_path / family)
        expected[family] = np.concatenate([model.encode([item]) for item in items])
    # In a folder of its own, so that no source tree is on the path.
    command = [clean_python, "-c", STOCK, str(tmp_path), json.dumps(list(FAMILIES))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for family, values in expected.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{family}.npy"), values, atol=1e-5, err_msg=family)
    assert sys.executable != str(clean_python)
