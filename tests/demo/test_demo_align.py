import json

import numpy as np
import pytest
import torch

from emoji.align import LENGTH, calibrate_norm, caption_states, fit_projector
from emoji.miniature import start_encoder
from emoji.settings import DemoSettings, StageSettings
from emoji.training import LOG_FILE, hard_negative_loss, run_stage, stage2_rows, trainable
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules import export_encoder, load_encoder
from unime_st.samplers import FalseNegativeAwareBatchSampler

SETTINGS = DemoSettings(stage2=StageSettings(4, 6, 1e-2), mini_batch_size=4, num_hard_negatives=2)
TEXTS = ["red heart", "blue boat", "a pilot", "green tree", "black drum", "a much longer caption than that"]


@pytest.fixture(scope="module")
def encoder_folder(linear_backbone):
    target = linear_backbone.parent / "encoder"
    export_encoder(start_encoder(linear_backbone), target)
    return target


@pytest.fixture
def model(encoder_folder):
    return load_encoder(encoder_folder, device="cpu")


def test_the_prompt_is_one_token_and_holds_everything(model):
    tokens = model[0].preprocess(["red heart"])["input_ids"][0]
    assert model[0].processor.decode(tokens) == "<|im_start|>red heart"
    shown = model[0].processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    )
    assert shown == "<|im_start|><image>what is it?"


def test_an_embedding_is_the_mean_over_all_tokens(model):
    embedded = model.encode(["a much longer caption than that", "red heart"])  # of two lengths, padded
    inputs = model[0].preprocess(["red heart"])
    with torch.no_grad():
        mean = model[0].model(input_ids=inputs["input_ids"]).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(embedded[1], torch.nn.functional.normalize(mean, dim=0), atol=1e-5)


def test_caption_states_are_those_of_the_caption_alone_before_the_norm(model):
    one, two = caption_states(model, ["red heart", "a much longer caption than that"])
    torch.testing.assert_close(one, caption_states(model, ["red heart"])[0])
    assert not torch.allclose(one, two)
    language = model[0].model.language_model
    seen = []
    handle = language.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model[0].model(input_ids=model[0].preprocess(["red heart"])["input_ids"])
    handle.remove()
    states = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(one, states[0, 1:].mean(0), atol=1e-5, rtol=1e-5)


def test_a_calibrated_norm_gives_each_dimension_its_weight(model):
    calibrate_norm(model, TEXTS)
    norm = model[0].model.language_model.norm
    weight = norm.weight.clone()
    with torch.no_grad():
        norm.weight.fill_(1.0)
        inputs = [model[0].preprocess([text])["input_ids"] for text in TEXTS]
        states = torch.stack([model[0].model(input_ids=ids).last_hidden_state[0].mean(0) for ids in inputs])
    mean, deviation = states.mean(0), states.std(0)
    torch.testing.assert_close(weight, deviation / (deviation**2 + mean**2), atol=1e-4, rtol=1e-3)


def test_the_projector_is_the_ridge_solution_on_mean_features(model):
    rng = np.random.default_rng(1)
    channels = model[0].model.multi_modal_projector.linear_1.weight.shape[1]
    features = [rng.normal(size=(len(TEXTS), 2, channels)).astype(np.float32) for _ in range(2)]
    states = LENGTH * caption_states(model, TEXTS).double().numpy()
    fit_projector(model, features, TEXTS, 2.0)
    x = np.concatenate([maps.mean(1) for maps in features]).astype(np.float64)
    x = (x - x.mean(0)) / (x.std(0, ddof=1) + 1e-6)
    y = np.concatenate([states, states])
    wanted = x @ np.linalg.solve(x.T @ x + 2.0 * np.eye(channels), x.T @ (y - y.mean(0))) + y.mean(0)
    with torch.no_grad():
        made = model[0].model.multi_modal_projector(torch.from_numpy(np.concatenate(features))).mean(1)
    np.testing.assert_allclose(made.numpy(), wanted, atol=1e-3)


def test_features_drop_out_in_training_alone_and_words_and_tower_are_not_trained(encoder_folder):
    model = trainable(encoder_folder, SETTINGS)
    projector = model[0].model.multi_modal_projector
    x = torch.ones(1, 50, projector.linear_1.weight.shape[1])
    torch.testing.assert_close(projector.eval()(x)[0, 0], projector(x)[0, 1])
    seen = projector.train()(x)[0]
    assert not torch.allclose(seen[0], seen[1])
    names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert names
    assert all("vision_tower" in name or "embed_tokens" in name for name in names)


def _train(folder, encoder_folder, rows):
    return run_stage(
        "stage2",
        encoder_folder,
        rows,
        hard_negative_loss(SETTINGS, hard_negatives_warmup_steps=2),
        SETTINGS.stage2,
        SETTINGS,
        folder,
        batch_sampler=FalseNegativeAwareBatchSampler,
        disable_tqdm=True,
    )


def test_a_stage_killed_and_started_again_ends_as_if_it_had_not_been(
    tmp_path, encoder_folder, benchmark_folder, monkeypatch
):
    rows = stage2_rows(benchmark_folder)
    whole = _train(tmp_path / "whole", encoder_folder, rows)
    log = json.loads((whole / LOG_FILE).read_text())["log"]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    assert all("negative_similarity" in row for row in log if "loss" in row)

    calls = []
    forward = HardNegativeInfoNCELoss.forward

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(HardNegativeInfoNCELoss, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut", encoder_folder, rows)
    assert not (tmp_path / "cut" / "stage2" / LOG_FILE).exists()
    resumed = _train(tmp_path / "cut", encoder_folder, rows)
    assert len(calls) == 5, "two steps, the one that died, and the two that were left"
    monkeypatch.setattr(HardNegativeInfoNCELoss, "forward", forward)

    image = str(next(iter(benchmark_folder.image_root.glob("google/*.png"))))
    texts = ["red heart", "a pilot", {"text": "what is it?", "image": image}]
    start = load_encoder(encoder_folder, device="cpu").encode(texts)
    one, two = (load_encoder(path, device="cpu").encode(texts) for path in (whole, resumed))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert np.abs(one - start).max() > 1e-3
    before = (resumed / LOG_FILE).stat().st_mtime_ns
    assert (_train(tmp_path / "cut", encoder_folder, rows) / LOG_FILE).stat().st_mtime_ns == before
