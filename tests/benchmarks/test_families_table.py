import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tiny import FAMILIES, PLUGIN_FAMILIES

PATH = Path(__file__).parents[2] / "benchmarks" / "families.py"


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("families", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["families"]


def test_the_table_has_no_empty_cell(families):
    table = json.loads(families.RESULTS.read_text())
    assert list(table) == [*FAMILIES, *PLUGIN_FAMILIES]
    assert all(list(row) == list(families.CHECKS) and all(row.values()) for row in table.values())


def test_a_cell_is_what_its_check_says(families, monkeypatch, tmp_path):
    def broken(backbone, folder):
        raise families.CheckError("it is broken")

    checks = {"load": families.load, "encode": broken, "LoRA": families.lora, "export": families.export}
    monkeypatch.setattr(families, "CHECKS", checks)
    row = families.check("fast_vlm", tmp_path)
    assert row == {"load": "yes", "encode": "it is broken", "LoRA": "yes", "export": "yes"}


def test_a_model_blind_to_images_does_not_pass(families, monkeypatch, backbone, tmp_path):
    build = families.build_encoder

    def blind(*arguments, **options):
        model = build(*arguments, **options)
        projector = model[0].model.multi_modal_projector
        projector.linear_2.weight.data.zero_()
        projector.linear_2.bias.data.zero_()
        return model

    monkeypatch.setattr(families, "build_encoder", blind)
    with pytest.raises(families.CheckError, match="ignores the image"):
        families.encode(backbone("fast_vlm"), tmp_path)
