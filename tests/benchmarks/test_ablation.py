import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

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


def test_every_variant_changes_one_thing_and_its_loss_can_be_made(ablation):
    losses = {}
    for name, changed in ablation.VARIANTS.items():
        own = {"stock", "stage1", "filter", "learning_rate", "batch_size"}
        options = {key: value for key, value in changed.items() if key not in own}
        loss = HardNegativeInfoNCELoss(None, **{"margin": 0.1, "num_hard_negatives": 8, **options})
        losses[name] = (str(sorted(loss.get_config_dict().items())), str(sorted(changed.items())))
    assert len(set(losses.values())) == len(ablation.VARIANTS)
    wanted = ("stock", "stage1", "filter", "negative_selection", "num_hard_negatives", "margin", *ablation.STAGE)
    assert all(any(key in changed for changed in ablation.VARIANTS.values()) for key in wanted)
    assert ablation.SETTINGS.margin == 0.1
    assert ablation.SETTINGS.num_hard_negatives == 8  # the paper's, in small


def test_the_table_holds_mean_and_sample_deviation(ablation):
    rng = np.random.default_rng(0)
    runs = {
        name: {seed: {metric: float(rng.random()) for metric in ablation.METRICS} for seed in (2, 0, 1)}
        for name in ablation.VARIANTS
    }
    summary = ablation.summarise(runs)
    for name, by_seed in runs.items():
        for metric in ablation.METRICS:
            values = [by_seed[seed][metric] for seed in (0, 1, 2)]
            row = summary["table"][name][metric]
            assert row["values"] == values
            np.testing.assert_allclose([row["mean"], row["std"]], [np.mean(values), np.std(values, ddof=1)])
    lines = ablation.markdown(summary).splitlines()
    for name in ablation.VARIANTS:
        row = summary["table"][name]["attribute_swaps"]
        line = next(line for line in lines if line.startswith(f"| {name} |"))
        assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" in line


def test_one_seed_has_no_deviation(ablation):
    runs = {"full": {0: dict.fromkeys(ablation.METRICS, 0.5)}}
    assert ablation.summarise(runs)["table"]["full"]["attribute_swaps"]["std"] is None
    assert "| full | 50.0 | 50.0 | 50.0 | 1 | – | – | – |" in ablation.markdown(ablation.summarise(runs))


def test_kept_runs_are_found_by_their_whole_name(ablation, tmp_path):
    for name, seed, value in (("k=32", 0, 0.1), ("k=32", 12, 0.2), ("k=all", 0, 0.3)):
        file = tmp_path / "test" / f"{seed}-{ablation._slug(name)}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dict.fromkeys(ablation.METRICS, value)))
    runs = ablation.kept_runs(tmp_path / "test")
    assert {name: sorted(found) for name, found in runs.items()} == {"k=32": [0, 12], "k=all": [0]}
    assert runs["k=32"][12] == dict.fromkeys(ablation.METRICS, 0.2)


def test_every_variant_keeps_its_runs_in_files_of_its_own(ablation):
    assert len({ablation._slug(name) for name in ablation.VARIANTS}) == len(ablation.VARIANTS)


def test_what_is_told_of_the_training_is_a_mean_over_the_last_steps_or_over_all(ablation):
    logs = [[{"positive_similarity": f"{value}", "false_negatives_filtered": value} for value in range(6)]] * 2
    runs = {"full": {seed: dict.fromkeys(ablation.METRICS, 0.5) | {"log": log} for seed, log in enumerate(logs)}}
    told = ablation.summarise(runs)["table"]["full"]["training"]
    wanted = {"positive_similarity": 3.5, "hard_negative_similarity": None, "false_negatives_filtered": 2.5}
    assert told == wanted
