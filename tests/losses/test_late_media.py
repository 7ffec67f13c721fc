"""Media opened mini-batch by mini-batch are the step with all opened at once, in every family; fewer are open."""

import copy
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import assert_same_step
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from test_distinct_inputs import encoder
from torch.nn.parallel import DistributedDataParallel

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from two_processes import run_two
from unime_st import build_encoder, images
from unime_st.data import bad_image_report, with_images
from unime_st.losses import CandidateKLLoss, HardNegativeInfoNCELoss
from unime_st.placement import IMAGES, LATE
from unime_st.videos import VideoSettings

FAST = ("llava_next", "qwen2_vl", "smolvlm")
EVERY_FAMILY = [
    family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
    for family in (*FAMILIES, *PLUGIN_FAMILIES)
]
VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llava_onevision")
MODES = {
    "whole": {},
    "rows": {"mini_batch_size": 3},
    "tokens": {"mini_batch_num_tokens": 200},
}
COLOURS = ("red", "green", "yellow", "purple", "orange", "black", "white", "pink")
SIZES = ((40, 30), (100, 30), (50, 80), (56, 56), (30, 90), (40, 30), (64, 64), (33, 47))


@pytest.fixture
def files(tmp_path):
    found = []
    for number, (colour, size) in enumerate(zip(COLOURS, SIZES, strict=True)):
        exif = images.Image.Exif()
        if number == 2:
            exif[0x0112] = 6  # on its side
        picture(colour, size).save(tmp_path / f"{number}.jpg", exif=exif, quality=95)
        found.append(str(tmp_path / f"{number}.jpg"))
    return found


def columns(files):
    """Images alone, with text, two in a row, one in several rows and columns; texts among them."""
    anchors = [{"image": file, "text": "which " + "x" * row} for row, file in enumerate(files)]
    anchors[3] = {"image": [files[0], files[1]], "text": "two"}
    anchors[4] = "words alone"
    anchors[6] = {"image": files[5], "text": "again?"}
    positives = [f"it is {colour}" if row % 2 else {"image": files[row - 1]} for row, colour in enumerate(COLOURS)]
    return anchors, positives


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded, in order."""
    found, plain = [], images._whole
    monkeypatch.setattr(images, "_whole", lambda image, name: found.append(name) or plain(image, name))
    return found


def prepared(model, columns, late, prompt="Say it."):
    model[0].late_media = late
    return [model.preprocess(list(column), prompt=prompt) for column in columns]


def step(model, loss, columns, late):
    model.zero_grad(set_to_none=True)
    model[0].vision_cache.clear()
    value = loss(prepared(model, columns, late), None)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def contrast(model, **options):
    return HardNegativeInfoNCELoss(model, temperature=1.0, num_hard_negatives=3, **options)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen vision", "trained vision"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_loss_and_gradients_are_those_of_media_opened_at_once(family, frozen, backbone, files, decoded):
    model = encoder(backbone(family), frozen=frozen).float()
    both = columns(files)
    for mode, options in MODES.items():
        loss = contrast(model, **options)
        eager = step(model, loss, both, None)
        plan = loss.last_plan
        decoded.clear()
        with torch.no_grad():
            loss(prepared(model, both, 0), None)
        once = len(decoded)
        assert once >= len(files) - 1
        for ahead in (0, 2):
            decoded.clear()
            late = step(model, loss, both, ahead)
            assert_same_step(eager, late, least=10, atol=1e-6)
            assert [rows.tolist() for _, rows in loss.last_plan.mini_batches] == [
                rows.tolist() for _, rows in plan.mini_batches
            ]
            if options and not frozen:  # the second pass reads pixels again, but for the mini-batch that is kept
                assert 1.5 * once < len(decoded) < 2 * once, mode
            else:
                assert len(decoded) == once, mode
        seen = [name for name, gradient in late[1].items() if "vis" in name or "img" in name]
        assert any(late[1][name].abs().max() > 1e-4 for name in seen) != frozen


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_tokens_are_known_before_anything_is_decoded(family, backbone, files, decoded):
    model = build_encoder(backbone(family), device="cpu", max_seq_length=120)
    for column in columns(files):
        column = [{"text": item} if isinstance(item, str) else item for item in column]
        column[5] = {**column[5], "text": "a long tale " * 30}  # which is cut
        (eager,) = prepared(model, [column], None)
        assert {"pixel_values", IMAGES} & eager.keys()
        decoded.clear()
        (late,) = prepared(model, [column], 0)
        assert not decoded
        for name in ("input_ids", "attention_mask", "num_images_per_sample", "content_id"):
            torch.testing.assert_close(late[name], eager[name], rtol=0, atol=0)
        assert eager["attention_mask"].sum(dim=1).max() <= 120
        tensors = [value for value in late.values() if isinstance(value, torch.Tensor)]
        assert sum(value.numel() for value in tensors) < 3 * late["input_ids"].numel()


def test_no_more_is_open_than_a_mini_batch_and_those_ahead(backbone, files, monkeypatch):
    model = encoder(backbone("qwen2_vl"), frozen=False)
    both = columns(files)
    sizes, waiting, most = [], [], []
    make, run = model[0]._made_late, model[0].forward

    def made(late, rows):
        found = make(late, rows)
        sizes.append(len(rows))
        waiting.append(rows)
        return found

    def forward(features):
        most.append(len(waiting))
        waiting.pop(0)
        return run(features)

    monkeypatch.setattr(model[0], "_made_late", made)
    monkeypatch.setattr(model[0], "forward", forward)
    for ahead in (0, 1, 2):
        most.clear()
        sizes.clear()
        step(model, contrast(model, mini_batch_size=2), both, ahead)
        assert max(sizes) == 2
        assert len(sizes) == len(most) > 10
        assert max(most) <= ahead + 1
        assert not waiting


def test_texts_alone_are_prepared_at_once(backbone):
    model = build_encoder(backbone("qwen2_vl"), device="cpu", late_media=0)
    assert LATE not in model.preprocess(["a", "b"])
    assert LATE in model.preprocess(["a", {"image": picture()}])
    assert LATE not in model.preprocess(["a", {"image": picture()}], late_media=False)


def test_a_batch_used_twice_and_outside_of_a_step_is_opened_again(backbone, files, decoded):
    model = encoder(backbone("llava_next"), frozen=True).float()
    loss, both = contrast(model, mini_batch_size=3), columns(files)
    expected = step(model, loss, both, None)
    late = prepared(model, both, 0)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model[0].forget_features()
        decoded.clear()
        value = loss([dict(column) for column in late], None)
        value.backward()
        assert decoded
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert_same_step(expected, (value.detach(), gradients), least=10)
    decoded.clear()
    with torch.no_grad():
        outside = model(dict(late[0]))["sentence_embedding"]
    assert decoded
    torch.testing.assert_close(outside, model(*prepared(model, both[:1], None))["sentence_embedding"].detach())


def test_without_room_for_features_the_second_pass_opens_media_again(backbone, files, decoded):
    model = encoder(backbone("qwen2_vl"), frozen=True).float()
    model[0].vision_cache.max_bytes = 0
    loss, both = contrast(model, mini_batch_size=3), columns(files)
    eager = step(model, loss, both, None)
    decoded.clear()
    assert_same_step(eager, step(model, loss, both, 0), least=10)
    assert len(decoded) > 1.5 * len(files)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: MultipleNegativesRankingLoss(model, scale=1.0),
        lambda model: CachedMultipleNegativesRankingLoss(model, scale=1.0, mini_batch_size=3),
        lambda model: MatryoshkaLoss(model, contrast(model, mini_batch_size=3), [32, 16]),
        lambda model: MatryoshkaLoss(model, contrast(model), [32, 16]),
    ],
    ids=["stock", "stock cached", "nested cached", "nested"],
)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_stock_losses_open_them_too(family, make, backbone, files):
    model = encoder(backbone(family), frozen=False).float()
    both = columns(files)
    if family == "qwen2_vl":  # whose patches stock code does not cut by rows where rows have none, or several
        both = [{"image": file, "text": "which?"} for file in files], [{"image": file} for file in files[::-1]]
    assert_same_step(step(model, make(model), both, None), step(model, make(model), both, 0), least=10)


def test_soft_labels(backbone, files):
    model = encoder(backbone("qwen3_vl"), frozen=True).float()
    three = (*columns(files), [{"image": file} for file in files[::-1]])
    scores = torch.tensor([[1.0, 0.2]] * 8)

    def run(late):
        model.zero_grad(set_to_none=True)
        value = CandidateKLLoss(model, temperature=0.5, mini_batch_size=3)(prepared(model, three, late), scores)
        value.backward()
        return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_same_step(run(None), run(1), least=10)


def frames(folder, seed, count, size):
    folder.mkdir()
    for number in range(count):
        frame = picture(COLOURS[(seed + number) % len(COLOURS)], size)
        frame.save(folder / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen vision", "trained vision"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_too(family, frozen, backbone, tmp_path, decoded):
    model = encoder(backbone(family), frozen=frozen).float()
    model[0].videos = VideoSettings(num_frames=4, max_pixels=1500)
    videos = [
        {"video": frames(tmp_path / str(n), n, 6, (40 + 20 * (n % 3), 40)), "text": f"clip {n}"} for n in range(6)
    ]
    both = videos, [f"a {colour} clip" for colour in COLOURS[:6]]
    options = {"mini_batch_size": 2}
    if family != "llava_onevision":  # the features of this one do not tell whose the videos are
        eager = step(model, contrast(model, **options), both, None)
    else:
        eager = step(model, contrast(model), both, None)
    decoded.clear()
    assert_same_step(eager, step(model, contrast(model, **options), both, 1), least=10)
    assert len(decoded) == 24 if frozen else len(decoded) > 24
    decoded.clear()
    (late,) = prepared(model, both[:1], 0)
    assert not decoded
    torch.testing.assert_close(late["input_ids"], prepared(model, both[:1], None)[0]["input_ids"], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_videos_in_every_form(family, backbone, files, tmp_path):
    model = encoder(backbone(family), frozen=True).float()
    folder = frames(tmp_path / "clip", 0, 4, (60, 40))
    array = np.random.default_rng(0).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
    forms = [folder, array, torch.from_numpy(array).movedim(3, 1), [files[0], files[5]], [folder, array]]
    both = [{"video": form, "text": "which?"} for form in forms], list(COLOURS[:5])
    loss = contrast(model, mini_batch_size=2)
    assert_same_step(step(model, loss, both, None), step(model, loss, both, 0), least=10)


def test_files_of_videos_too(backbone, tmp_path):
    av = pytest.importorskip("av")
    model = encoder(backbone("qwen3_vl"), frozen=True).float()
    model[0].videos = VideoSettings(num_frames=4)
    videos = []
    for number in range(4):
        file = tmp_path / f"{number}.mkv"
        with av.open(str(file), "w") as container:
            stream = container.add_stream("ffv1", rate=10 + number)
            stream.width, stream.height, stream.pix_fmt = 40 + 10 * number, 40, "bgr0"
            for place in range(9):
                frame = picture(COLOURS[(place + number) % 8], (40 + 10 * number, 40))
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        videos.append({"video": str(file), "text": "which?"})
    both = videos, list(COLOURS[:4])
    eager, late = (prepared(model, both, how)[0] for how in (None, 0))
    assert LATE in late
    torch.testing.assert_close(late["input_ids"], eager["input_ids"], rtol=0, atol=0)
    loss = contrast(model, mini_batch_size=2)
    assert_same_step(step(model, loss, both, None), step(model, loss, both, 0), least=10)


# The first process shows images in the targets alone.
ROWS = 4


def share(folder, files, rows, wrap, late):
    model = build_encoder(folder, device="cpu").float()
    wrapped = wrap(model)
    loss = contrast(wrapped, gather_across_devices=True, mini_batch_num_tokens=200)
    anchors, positives = columns(files)
    anchors[:ROWS] = ["a", "b", "c", "d"]
    given = prepared(model, [anchors[rows], positives[rows]], late)
    value = loss([dict(column) for column in given], None)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def job(rank, folder, files):
    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    return share(folder, files, slice(rank * ROWS, (rank + 1) * ROWS), wrap, 1)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_two_processes_are_one_with_all_opened(family, backbone, files, tmp_path):
    one = share(backbone(family), files, slice(None), lambda model: model, None)
    first, second = run_two(job, tmp_path, backbone(family), files)
    assert first[0] != second[0]
    for rank in (first, second):
        assert_same_step(one, ((first[0] + second[0]) / 2, rank[1]), least=10, atol=2e-6)
    assert any("vis" in name and gradient.abs().max() > 1e-4 for name, gradient in one[1].items())


def trained(model, data, folder, late, **arguments):
    model = copy.deepcopy(model)
    model[0].late_media = late
    loss = HardNegativeInfoNCELoss(model, temperature=0.5, mini_batch_size=2)
    settings = SentenceTransformerTrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        prompts={"anchor": "Find it."},
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = SentenceTransformerTrainer(model, settings, train_dataset=data, loss=loss)
    trainer.train()
    return dict(model.state_dict()), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("max_pixels", [None, 1500])
def test_the_trainer_learns_the_same(workers, max_pixels, backbone, files, tmp_path, decoded):
    rows = Dataset.from_dict({"anchor": [f"a {colour} thing" for colour in COLOURS], "positive": files})
    options = {"image_root": tmp_path, "image_columns": ["positive"], "max_pixels": max_pixels}
    model = encoder(backbone("qwen2_vl"), frozen=True).float()
    eager = trained(model, with_images(rows, **options), tmp_path / "a", None, dataloader_num_workers=workers)
    decoded.clear()
    data = with_images(rows, **options, late_images=True)
    late = trained(model, data, tmp_path / "b", 1, dataloader_num_workers=workers)
    assert decoded
    moved = 0
    for name, value in eager[0].items():
        torch.testing.assert_close(late[0][name], value, rtol=0, atol=1e-6)
        moved += bool((value - model.state_dict()[name]).abs().max() > 1e-4)
    assert moved > 10
    assert late[1] == pytest.approx(eager[1], abs=1e-4)


def test_images_of_data_sets_are_opened_late(files, tmp_path, decoded):
    shutil.copy(files[0], tmp_path / "copy.jpg")
    rows = Dataset.from_dict({"anchor": ["a", "b"], "positive": [files[0], "copy.jpg"]})
    options = {"image_root": tmp_path, "image_columns": ["positive"], "max_pixels": 500}
    late = with_images(rows, **options, late_images=True)[:]["positive"]
    assert not decoded
    assert late[0].size() == late[0].open().size == with_images(rows, **options)[0]["positive"].size
    assert late[0].size() != (40, 30)
    copied = pickle.loads(pickle.dumps(late[1]))
    assert copied == late[1] != late[0]
    assert late[0].open().tobytes() == copied.open().tobytes()


def test_one_image_in_two_files_is_no_negative_of_itself(backbone, files, tmp_path):
    model = build_encoder(backbone("qwen2_vl"), device="cpu", late_media=0)
    shutil.copy(files[0], tmp_path / "copy.jpg")
    features = [model.preprocess(["a", "b"]), model.preprocess([{"image": files[0]}, {"image": tmp_path / "copy.jpg"}])]
    loss = HardNegativeInfoNCELoss(model, mini_batch_size=1)
    loss(features, None)
    assert loss.last_plan.distinct == 3
    assert loss.last_metrics["false_negatives_by_identity"] == 1


def cut_short(file):
    """Damage behind the header."""
    os.truncate(file, Path(file).stat().st_size - 100)


def test_damage_names_its_row_and_file(backbone, files, tmp_path):
    model = encoder(backbone("qwen2_vl"), frozen=False)
    cut_short(files[5])
    loss, both = contrast(model, mini_batch_size=2), columns(files)
    with pytest.raises(ValueError, match=r"5\.jpg \(row [56]\)") as caught:
        step(model, loss, both, 1)
    assert "Row" in "".join(caught.value.__notes__)
    rows = Dataset.from_dict({"anchor": list(COLOURS), "positive": files})
    options = {"image_root": tmp_path, "image_columns": ["positive"], "late_images": True}
    data = with_images(rows, **options)[:]
    with pytest.raises(ValueError, match=r"Row 5: Cannot read image .*5\.jpg.*Replace the file"):
        step(model, loss, (data["anchor"], data["positive"]), 0)


def test_bad_images_of_late_data_are_replaced_and_told(files, tmp_path):
    cut_short(files[5])
    rows = Dataset.from_dict({"anchor": list(COLOURS), "positive": files})
    options = {"image_root": tmp_path, "image_columns": ["positive"], "late_images": True}
    log = tmp_path / "bad.jsonl"
    data = with_images(rows, **options, name="mine", max_bad_images=1, bad_images_log=log)[:]
    assert data["anchor"][5] == data["anchor"][6] == "white"
    assert data["positive"][5].file == files[6]
    assert "mine" in str(bad_image_report(log))


def test_a_missing_image_is_told_before_the_step(backbone, files):
    model = build_encoder(backbone("qwen2_vl"), device="cpu", late_media=0)
    with pytest.raises(FileNotFoundError, match=r"Row 1: there is no image file '.*none\.jpg'"):
        model.preprocess([{"image": files[0]}, {"image": "none.jpg"}])


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_the_argument_is_checked(value, error, backbone):
    with pytest.raises(error, match="late_media"):
        build_encoder(backbone("qwen2_vl"), device="cpu", late_media=value)
