import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from emoji.concepts import HELD_OUT_VENDOR, TRAINED_VENDORS
from unime_st.losses import HardNegativeInfoNCELoss

PATH = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("ablation", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ablation"]


@pytest.fixture
def runs(ablation):
    rng = np.random.default_rng(0)

    def one():
        asked = {name: rng.random(30).tolist() for name in ablation.ASKED}
        return {"scores": asked, ablation.SWAPS: float(rng.random()), "cone": float(rng.random())}

    return {name: [one() for _ in range(3)] for name in ablation.VARIANTS}


def test_every_variant_is_another_one_and_its_loss_can_be_made(ablation):
    losses = {}
    for name, changed in ablation.VARIANTS.items():
        own = {"stock", "stage1", "hard_rows"}
        options = {key: value for key, value in changed.items() if key not in own}
        given = {"margin": 0.1, "num_hard_negatives": 8, "hard_negatives_warmup_steps": 8, **options}
        loss = HardNegativeInfoNCELoss(None, **given)
        losses[name] = (str(sorted(loss.get_config_dict().items())), str(sorted(changed.items())))
    assert len(set(losses.values())) == len(ablation.VARIANTS)
    assert ablation.SETTINGS.margin == 0.1
    assert ablation.SETTINGS.num_hard_negatives == 8  # the paper's, in small


def test_the_tables_hold_mean_sample_deviation_and_paired_differences(ablation, runs):
    found = ablation.summarise(runs)
    for name, made in runs.items():
        for asked in ablation.ASKED:
            values = [np.mean(run["scores"][asked]) for run in made]
            row = found["rows"][name][asked]
            np.testing.assert_allclose([row["mean"], row["std"]], [np.mean(values), np.std(values, ddof=1)])
    ours, stock, alone = (runs[name] for name in (ablation.ALL, ablation.STOCK, ablation.ALONE))
    difference = found["differences"][f"{ablation.ALL} − {ablation.STOCK}"]["text→image"]
    asked = [np.array([run["scores"]["text→image"] for run in each]) for each in (ours, stock)]
    np.testing.assert_allclose(difference["mean"], (asked[0] - asked[1]).mean())
    assert difference["low"] < difference["mean"] < difference["high"]
    swaps = found["differences"][f"{ablation.ALL} − {ablation.ALONE}"][ablation.SWAPS]["mean"]
    paired = [one[ablation.SWAPS] - other[ablation.SWAPS] for one, other in zip(ours, alone, strict=True)]
    np.testing.assert_allclose(swaps, np.mean(paired))
    text = ablation.markdown({"split": "test", "batches": {"256": found}})
    assert all(f"| {name} | " in text for name in runs)


def test_one_seed_has_neither_deviation_nor_interval(ablation, runs):
    found = ablation.summarise({name: made[:1] for name, made in runs.items()})
    assert found["rows"][ablation.STOCK][ablation.SWAPS]["std"] is None
    assert found["differences"] == {}
    assert f"| {ablation.STOCK} | " in ablation.markdown({"split": "test", "batches": {"256": found}})


def test_scores_are_reciprocal_ranks_over_the_vendors_of_each_question(ablation):
    ways = {"text_to_image": [1, 2, 4], "image_to_text": [5, 1, 1]}
    vendors = (*TRAINED_VENDORS, HELD_OUT_VENDOR)
    found = {f"{vendor} {kind}": ways for vendor in vendors for kind in ("label", "keywords", "definition")}
    found[f"{TRAINED_VENDORS[0]} label"] = {"text_to_image": [2, 2, 2], "image_to_text": [1, 1, 1]}
    made = ablation.scores(found)
    assert made["text→image"] == [0.75, 0.5, 0.375]
    assert made["image→text"] == [0.6, 1, 1]
    assert made["text→image, held-out vendor"] == made["keywords→image"] == [1, 0.5, 0.25]
