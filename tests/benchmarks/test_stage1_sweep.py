import importlib.util
import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from unime_st.functional import KL_DIRECTIONS
from unime_st.losses import DistillKLLoss
from unime_st.modules import build_encoder

FOLDER = Path(__file__).parents[2] / "benchmarks"


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sweep():
    yield _loaded("stage1_sweep")
    del sys.modules["stage1_sweep"]


@pytest.fixture(scope="module")
def lab():
    yield _loaded("stage1_lab")
    del sys.modules["stage1_lab"]


@pytest.fixture
def runs(sweep):
    rng = np.random.default_rng(0)

    def result():
        return {score: float(rng.random()) for score in sweep.SCORES} | {"log": [{"gradient_norm": 0.5}]}

    grid = {variant: {0: result()} for variant in sweep.GRID}
    for variant in sweep.finalists(grid):
        grid[variant] |= {2: result(), 1: result()}
    return grid


@pytest.fixture
def anchors(sweep):
    of = {f"{value:g}": 0.5 for value in sweep.TEMPERATURES}
    return {
        "base": dict.fromkeys(sweep.SCORES, 0.1),
        "teacher": dict.fromkeys(sweep.SCORES, 0.9),
        "held_out_pairs": {"term_to_gloss": 3, "label_to_keywords": 2},
        "teacher_self_probability": {"48": of, "1536": of},
    }


def test_the_grid_is_whole_and_its_losses_can_be_made(sweep):
    wanted = list(product((0.02, 0.05, 0.1, 0.2), KL_DIRECTIONS, (False, True)))
    assert [tuple(variant) for variant in sweep.GRID] == wanted
    assert len({str(variant) for variant in sweep.GRID}) == len(wanted) == 24
    assert set(sweep.ALWAYS) <= set(sweep.GRID)
    for variant in sweep.GRID:
        config = DistillKLLoss(None, **variant._asdict()).get_config_dict()
        assert variant._asdict().items() <= config.items()


def test_the_kept_results_are_of_the_whole_grid_and_the_tables_are_made_of_them(sweep):
    summary = json.loads((sweep.RESULTS / "stage1_sweep.json").read_text(encoding="utf-8"))
    assert list(summary["table"]) == [str(variant) for variant in sweep.GRID]
    assert all(row["seeds"][0] == 0 and len(row[sweep.CRITERION]["values"]) == len(row["seeds"])
               for row in summary["table"].values())  # fmt: skip
    repeated = {name for name, row in summary["table"].items() if len(row["seeds"]) > 1}
    assert repeated == set(summary["finalists"]) >= {str(variant) for variant in sweep.ALWAYS}
    assert (sweep.RESULTS / "stage1_sweep.md").read_text(encoding="utf-8") == sweep.markdown(summary)
    settings = json.loads(json.dumps(sweep.asdict(sweep.SETTINGS)))
    assert settings.items() <= summary["settings"].items()


def test_mean_deviation_and_spread_are_over_seeds(sweep, runs, anchors):
    summary = sweep.summarise(runs, anchors)
    chosen = sweep.finalists(runs)
    assert set(sweep.ALWAYS) < set(chosen)
    variances = []
    for variant, by_seed in runs.items():
        row = summary["table"][str(variant)]["spearman_with_teacher"]
        values = [by_seed[seed]["spearman_with_teacher"] for seed in sorted(by_seed)]
        assert row["values"] == values
        assert row["mean"] == pytest.approx(np.mean(values))
        if variant in chosen:
            assert row["std"] == pytest.approx(np.std(values, ddof=1))
            variances.append(np.var(values, ddof=1))
        else:
            assert row["std"] is None
    assert summary["spread_of_seeds"]["spearman_with_teacher"] == pytest.approx(np.sqrt(np.mean(variances)))
    means = summary["mean_of_grid"]["direction"]
    own = [runs[variant][0][sweep.CRITERION] for variant in sweep.GRID if variant.direction == "symmetric"]
    assert len(own) == 8
    assert means["symmetric"] == pytest.approx(np.mean(own))


def test_the_best_of_the_grid_are_repeated_and_compared_seed_by_seed(sweep, runs, anchors):
    best = max(sweep.GRID, key=lambda variant: runs[variant][0][sweep.CRITERION])
    assert sweep.finalists(runs)[0] == best
    assert len(sweep.finalists(runs)) <= sweep.FINALISTS + len(sweep.ALWAYS)
    behind = sweep.summarise(runs, anchors)["finalists"]
    leader = next(iter(behind))
    assert behind[leader]["behind_best"]["values"] == [0.0, 0.0, 0.0]
    assert all(row["behind_best"]["mean"] >= 0 for row in behind.values())
    for variant in sweep.finalists(runs):
        later = np.mean([runs[variant][seed][sweep.CRITERION] for seed in (1, 2)])
        assert behind[str(variant)]["mean_without_seed_0"] == pytest.approx(later)


def test_a_grid_with_gaps_has_no_table(sweep, runs, anchors):
    del runs[sweep.GRID[5]]
    with pytest.raises(ValueError, match="Run the sweep to its end"):
        sweep.summarise(runs, anchors)


def test_kept_runs_are_found_and_those_of_another_grid_refused(sweep, tmp_path):
    for seed, index in ((0, 3), (12, 3), (0, 10)):
        (tmp_path / f"{seed}-{index}.json").write_text(json.dumps({"variant": str(sweep.GRID[index]), "seed": seed}))
    (tmp_path / "anchors.json").write_text("{}")
    found = sweep.kept_runs(tmp_path)
    assert {variant: sorted(by_seed) for variant, by_seed in found.items()} == {
        sweep.GRID[3]: [0, 12],
        sweep.GRID[10]: [0],
    }
    assert found[sweep.GRID[3]][12]["seed"] == 12
    (tmp_path / "0-4.json").write_text(json.dumps({"variant": "of old"}))
    with pytest.raises(ValueError, match="give another --work"):
        sweep.kept_runs(tmp_path)


def test_every_cell_is_in_the_readmes_table(sweep, runs, anchors):
    summary = sweep.summarise(runs, anchors)
    table = _loaded("readme").stage1_sweep_table(summary).splitlines()
    del sys.modules["readme"]
    assert table[0].count("|") == 1 + 1 + 6 + 2
    heads = [cell.strip() for cell in table[0].split("|")]
    for variant in sweep.GRID:
        row = summary["table"][str(variant)][sweep.CRITERION]
        line = next(line for line in table if line.startswith(f"| {variant.temperature:g} |"))
        column = heads.index(f"{variant.direction}, {'in' if variant.include_diagonal else 'out'}")
        assert line.split("|")[column].strip() == f"{100 * row['values'][0]:.1f}"
        if row["std"] is not None:
            assert any(f"| {variant} | {100 * row['mean']:.1f} ± {100 * row['std']:.1f} |" in line for line in table)


def test_scores_are_those_of_a_loop(lab):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(20, 8, generator=generator), torch.randn(20, 5, generator=generator)
    student[3:5] += 2 * student[9:11]  # some right answers near their queries
    got = lab.scores(student, teacher, {"a": 6, "b": 4})

    def cosine(rows, left, right):
        return float(torch.cosine_similarity(rows[left].double(), rows[right].double(), dim=0))

    reciprocal = {}
    for name, start, count in (("a", 0, 6), ("b", 12, 4)):
        ranks = []
        for query in range(start, start + count):
            to = [cosine(student, query, start + count + answer) for answer in range(count)]
            ranks.append(1 + sum(other > to[query - start] for other in to))
        for k in (1, 5):
            assert got[f"{name}_recall@{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]))
        reciprocal[name] = np.mean([1 / rank for rank in ranks])
    assert 0 < got["a_recall@1"] < 1
    assert got["mean_reciprocal_rank"] == pytest.approx((reciprocal["a"] + reciprocal["b"]) / 2)
    pairs = [(left, right) for left in range(20) for right in range(left)]
    both = [[cosine(rows, *pair) for pair in pairs] for rows in (student, teacher)]
    assert got["spearman_with_teacher"] == pytest.approx(spearmanr(*both).statistic)
    nearest = [
        [max((other for other in range(20) if other != row), key=lambda other: cosine(rows, row, other))
         for row in range(20)] for rows in (student, teacher)
    ]  # fmt: skip
    assert got["nearest_neighbor_agreement"] == pytest.approx(np.mean(np.equal(*nearest)))
    own = lab.scores(teacher, teacher, {"a": 6, "b": 4})
    assert own["spearman_with_teacher"] == pytest.approx(1)
    assert own["nearest_neighbor_agreement"] == 1


def test_the_upper_layers_on_kept_states_are_the_model(lab, backbone):
    model = build_encoder(backbone("fast_vlm"), prompt_template="chatml_open", device="cpu")
    texts = [" ".join(["words"] * count) for count in range(1, lab.CHUNK + 4)]  # more than one chunk
    wanted = torch.nn.functional.normalize(torch.from_numpy(model.encode(texts)))
    depth = len(model[0].model.language_model.layers)
    assert depth > 1
    states = lab.lower_states(model[0], texts, 1)
    assert len(model[0].model.language_model.layers) == depth
    upper = lab.UpperLayers(
        model[0].model.language_model, lab.SweepSettings(align_layer=1, adapted_layers=tuple(range(1, depth)))
    )
    parameters = upper.reset(0)
    assert parameters
    with torch.inference_mode():
        embedded = torch.nn.functional.normalize(upper(states))
    torch.testing.assert_close(embedded, wanted, atol=1e-5, rtol=0)
    assert (embedded[0] - embedded[-1]).abs().max() > 1e-3

    first = [parameter.detach().clone() for parameter in parameters]
    upper(states).sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    assert all(map(torch.equal, upper.reset(0), first))
    assert not all(map(torch.equal, upper.reset(1), first))
