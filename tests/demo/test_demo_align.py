import json

import numpy as np
import pytest
import torch

from emoji.align import (
    FoldLoss,
    caption_states,
    fit_projections,
    fold_of_images,
    load_projections,
    save_projections,
)
from emoji.benchmark import concepts_of
from emoji.concepts import TRAINED_VENDORS
from emoji.settings import DemoSettings, StageSettings
from emoji.training import LOG_FILE, fold_of, hard_negative_loss, run_stage, stage2_rows
from unime_st.modules import build_encoder, export_encoder, load_encoder
from unime_st.samplers import FalseNegativeAwareBatchSampler

SETTINGS = DemoSettings(
    folds=3, stage2=StageSettings(4, 6, 1e-2, 0.05), lora_rank=2, adapted_layers=(1,), rows_per_subset=12
)


@pytest.fixture(scope="module")
def encoder_folder(linear_backbone):
    target = linear_backbone.parent / "encoder"
    export_encoder(build_encoder(linear_backbone, prompt_template="chatml_open", device="cpu"), target)
    return target


@pytest.fixture(scope="module")
def folds(fake, benchmark_folder):
    return fold_of_images(concepts_of(fake, benchmark_folder)["train"], TRAINED_VENDORS, SETTINGS.folds, 0)


@pytest.fixture(scope="module")
def projections(encoder_folder):
    model = load_encoder(encoder_folder, device="cpu")
    width, channels = model[0].model.multi_modal_projector.linear_1.weight.shape
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(30, 4, channels)).astype(np.float32) for _ in TRAINED_VENDORS]
    targets = torch.from_numpy(rng.normal(size=(30, width)))
    return fit_projections(features, targets, [index % SETTINGS.folds for index in range(30)], 1.0)


def test_a_projection_knows_nothing_of_its_own_fold():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(12, 3, 5)).astype(np.float32) for _ in range(2)]
    targets = torch.from_numpy(rng.normal(size=(12, 4)))
    own = [index % 3 for index in range(12)]
    before = fit_projections(features, targets, own, 1.0)
    changed = targets.clone()
    changed[[index for index in range(12) if own[index] == 1]] += 7.0
    after = fit_projections(features, changed, own, 1.0)
    same = [torch.equal(old.weight, new.weight) for old, new in zip(before, after, strict=True)]
    assert same == [False, False, True, False]  # all, without 0, without 1, without 2


def test_a_projection_is_the_ridge_solution_on_mean_features():
    rng = np.random.default_rng(1)
    features = [rng.normal(size=(9, 2, 3)).astype(np.float32)]
    targets = torch.from_numpy(rng.normal(size=(9, 4)))
    fit = fit_projections(features, targets, [0] * 5 + [1] * 4, 2.0)[0]
    x = features[0].mean(1).astype(np.float64)
    x = (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-6)
    y = targets.numpy()
    wanted = x @ np.linalg.solve(x.T @ x + 2.0 * np.eye(3), x.T @ (y - y.mean(0))) + y.mean(0)
    shown = torch.from_numpy(features[0].mean(1)) @ fit.weight.T + fit.bias
    np.testing.assert_allclose(shown.numpy(), wanted, atol=1e-4)


def test_written_into_a_model_it_is_what_the_model_does(encoder_folder, projections):
    model = load_encoder(encoder_folder, device="cpu")
    projections[2].write(model)
    x = torch.randn(2, 5, projections[2].weight.shape[1])
    made = model[0].model.multi_modal_projector(x)
    torch.testing.assert_close(made, x @ projections[2].weight.T + projections[2].bias, atol=1e-4, rtol=1e-4)


def test_projections_are_read_back(tmp_path, projections):
    save_projections(projections, tmp_path / "p.safetensors")
    read = load_projections(tmp_path / "p.safetensors")
    assert len(read) == SETTINGS.folds + 1
    assert all(
        torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(projections, read, strict=True)
    )


def test_caption_states_are_those_of_the_caption_alone(encoder_folder):
    model = load_encoder(encoder_folder, device="cpu")
    one, two = caption_states(model, ["red heart", "a much longer caption than that"], 1)
    torch.testing.assert_close(one, caption_states(model, ["red heart"], 1)[0])
    assert not torch.allclose(one, two)
    inputs = model[0].preprocess(["red heart"])
    tokens = model[0].processor.tokenizer("red heart", add_special_tokens=False)["input_ids"]
    ids = inputs["input_ids"][0].tolist()
    start = next(i for i in range(len(ids)) if ids[i : i + len(tokens)] == tokens)
    hidden = model[0].model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(one, hidden[start : start + len(tokens)].mean(0), atol=1e-5, rtol=1e-5)


def test_folds_part_concepts_not_drawings(fake, benchmark_folder, folds):
    concepts = concepts_of(fake, benchmark_folder)["train"]
    by_role = {}
    for concept in concepts:
        mine = {
            folds[concept.image(vendor, tone)]
            for vendor in TRAINED_VENDORS
            for tone in range(6 if concept.has_tones else 1)
        }
        by_role.setdefault(concept.role, set()).update(mine)
    assert all(len(own) == 1 for own in by_role.values())
    assert set(folds.values()) == {0, 1, 2}


def test_rows_of_a_data_set_are_of_one_fold_and_one_kind(benchmark_folder, folds):
    rows = stage2_rows(benchmark_folder, SETTINGS, folds)
    assert {name.split("_")[1] for name in rows} == {"text", "image"}
    seen = 0
    for name, part in rows.items():
        for row in part.with_format(None):
            paths = [row[column]["image"] for column in ("anchor", "positive")]
            own = {folds[path] for path in paths if path in folds}
            assert own <= {fold_of(name)}
            assert bool(row["positive"]["image"]) == name.endswith("image")
            seen += bool(own)
    assert seen > 50


def test_a_batch_passes_through_the_projector_fitted_without_its_fold(encoder_folder, projections):
    model = load_encoder(encoder_folder, device="cpu")
    seen = []

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, features, labels=None):
            seen.append(self.model[0].model.multi_modal_projector.linear_1.weight.clone())
            return torch.zeros(())

    loss = Loss()
    for projection in (projections[3], projections[1]):
        FoldLoss(loss, projection)([], None)
    assert torch.equal(seen[0], projections[3].weight)
    assert torch.equal(seen[1], projections[1].weight)


def _train(folder, encoder_folder, rows, projections, **options):
    return run_stage(
        "stage2",
        encoder_folder,
        rows,
        hard_negative_loss(SETTINGS.stage2, SETTINGS, num_hard_negatives=2),
        SETTINGS.stage2,
        SETTINGS,
        folder,
        projections=projections,
        batch_sampler=FalseNegativeAwareBatchSampler,
        disable_tqdm=True,
        **options,
    )


def test_a_stage_killed_and_started_again_ends_as_if_it_had_not_been(
    tmp_path, encoder_folder, benchmark_folder, folds, projections, monkeypatch
):
    rows = stage2_rows(benchmark_folder, SETTINGS, folds)
    whole = _train(tmp_path / "whole", encoder_folder, rows, projections)
    log = json.loads((whole / LOG_FILE).read_text())["log"]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    assert all("false_negatives_filtered" in row for row in log if "loss" in row)

    calls = []
    forward = FoldLoss.forward

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(FoldLoss, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", encoder_folder, rows, projections)
    assert not (tmp_path / "cut" / "stage2" / LOG_FILE).exists()
    resumed = _train(tmp_path / "cut", encoder_folder, rows, projections)
    assert len(calls) == 5, "two steps, the one that died, and the two that were left"
    monkeypatch.setattr(FoldLoss, "forward", forward)

    texts = [
        "red heart",
        "a pilot",
        {"text": "what is it?", "image": next(iter(benchmark_folder.image_root.glob("google/*.png")))},
    ]
    start = load_encoder(encoder_folder, device="cpu").encode(texts)
    one, two = (load_encoder(path, device="cpu").encode(texts) for path in (whole, resumed))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert np.abs(one - start).max() > 1e-3
    shown = load_encoder(resumed, device="cpu")[0].model.multi_modal_projector.linear_1.weight
    assert torch.equal(shown, projections[0].weight)
    before = (resumed / LOG_FILE).stat().st_mtime_ns
    assert (_train(tmp_path / "cut", encoder_folder, rows, projections) / LOG_FILE).stat().st_mtime_ns == before
