"""Videos as inputs: every form and family, a batch like its rows, both losses, what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from losses.helpers import assert_same_step, run
from tiny import FAMILIES, PLUGIN_FAMILIES, picture, tiny_backbone
from unime_st import build_encoder, load_encoder
from unime_st.evaluation import model_fingerprint
from unime_st.identity.content import Content, content_id
from unime_st.identity.rows import row_identities
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.modules import build_reranker
from unime_st.samplers import FalseNegativeAwareBatchSampler
from unime_st.videos import UnreadableVideoError, VideoSettings, even_places, frame_files, open_video

VIDEO_FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "llava_onevision"]
STACKING = ["smolvlm", "llava_onevision"]


def noise(count, seed=0, size=(40, 30)):
    """Frames of noise."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def stored(folder, frames):
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"frame_{number}.png")
    return folder


def write_file(path, frames, rate=10):
    """A video file whose frames come back unchanged, but for rounding of colours."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def encoders(backbone):
    made = {}

    def get(family, **options):
        key = family, repr(options)
        if key not in made:
            made[key] = build_encoder(backbone(family), device="cpu", **options)
        return made[key]

    return get


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_batch_is_like_its_rows(encoders, family):
    """Mixed with texts, images and rows without media; videos of differing lengths and shapes."""
    model = encoders(family)
    items = [
        {"video": noise(4), "text": "a"}, {"video": noise(4, 1, (60, 20)), "text": "bbbb"}, {"video": noise(2, 2)},
        {"video": noise(3, 3), "text": "c"}, {"video": noise(8, 4)}, "just words",
        {"image": picture("red"), "text": "x"}, picture("green"), {"video": noise(1, 5)},
        {"video": noise(4), "text": "a"},
    ]  # fmt: skip
    if family != "smolvlm":
        items.append({"image": picture("green"), "video": noise(4, 9), "text": "x"})
        items.append({"video": [noise(4, 7), noise(4, 8)], "text": "two"})
    alone = np.concatenate([model.encode([item]) for item in items])
    together = model.encode(items)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(model.encode(items[::-1], batch_size=3)[::-1], alone, atol=1e-5)
    distinct = np.delete(together, 9, axis=0)
    gaps = np.abs(distinct[:, None] - distinct[None]).max(axis=2) + np.eye(len(distinct))
    assert gaps.min() > 1e-4  # no two are one
    assert np.array_equal(together[0], together[9])


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_all_forms_of_a_video_are_one(encoders, family, tmp_path):
    model = encoders(family)
    frames = noise(4)
    folder = stored(tmp_path / "video", frames)
    paths = [str(folder / f"frame_{number}.png") for number in range(4)]
    array = np.stack([np.asarray(frame) for frame in frames])
    data = [path.read_bytes() for path in map(type(folder), paths)]
    forms = [frames, tuple(frames), str(folder), folder, paths, array, torch.from_numpy(array), data]
    forms.append(torch.from_numpy(array).permute(0, 3, 1, 2))
    expected = model.encode([{"video": frames, "text": "a"}])
    for form in forms:
        np.testing.assert_allclose(model.encode([{"video": form, "text": "a"}]), expected, atol=1e-6)
    chat = [{"role": "user", "content": [{"type": "video", "video": str(folder)}, {"type": "text", "text": "a"}]}]
    np.testing.assert_allclose(model.encode([chat]), expected, atol=1e-6)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_frames_and_their_order_count(encoders, family):
    model = encoders(family)
    frames = noise(4)
    both = model.encode([{"video": frames}, {"video": frames[::-1]}, {"video": [frames[0]] * 4}])
    assert np.abs(both[0] - both[1]).max() > 1e-4
    assert np.abs(both[0] - both[2]).max() > 1e-4


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_stock_code_on_the_saved_encoder_gives_the_same(encoders, family, tmp_path):
    ours = encoders(family)
    ours.save_pretrained(str(tmp_path))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    told = {"video": {"do_sample_frames": False}}
    items = [{"video": noise(4), "text": "a dog"}]
    np.testing.assert_allclose(ours.encode(items), stock.encode(items, processing_kwargs=told), atol=1e-5)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_settings_choose_frames_and_sizes(backbone, encoders, family):
    frames = noise(9)
    model = build_encoder(backbone(family), device="cpu", videos=VideoSettings(num_frames=4))
    chosen = [frames[place] for place in (0, 2, 5, 8)]
    found = model.encode([{"video": frames}])
    np.testing.assert_allclose(found, encoders(family).encode([{"video": chosen}]), atol=1e-6)
    small = build_encoder(backbone(family), device="cpu", videos=VideoSettings(max_pixels=100))
    video = small[0].videos
    opened = open_video(frames, video, lambda frame: frame)
    assert {frame.size for frame in opened} == {(11, 8)}
    assert np.abs(small.encode([{"video": frames}]) - encoders(family).encode([{"video": frames}])).max() > 1e-5


@pytest.mark.parametrize("family", sorted({*FAMILIES, *PLUGIN_FAMILIES} - set(VIDEO_FAMILIES)))
def test_families_without_videos_say_so(encoders, family):
    with pytest.raises(ValueError, match=f"Row 1 has a video, but the family {family} takes none"):
        encoders(family).encode(["a text", {"video": noise(2), "text": "a"}])


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("frozen", [True, False])
def test_losses_in_mini_batches_do_what_they_do_at_once(backbone, family, frozen):
    """GradCache's step is the plain one: a column of videos beside one of texts; loss and every gradient."""
    model = build_encoder(backbone(family), device="cpu")
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("language_model" in name or "text_model" in name)
    videos = [{"video": noise(4, seed), "text": f"video {seed}"} for seed in (0, 1, 2, 0)]
    columns = [f"caption {number}" for number in range(3)] + ["caption 0"], videos
    steps = [
        run(HardNegativeInfoNCELoss(model, temperature=0.5, mini_batch_size=size), model, columns)
        for size in (None, 1, 3)
    ]
    for step in steps[1:]:
        assert_same_step(steps[0], step, least=10, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_losses_of_mixed_rows(backbone, family):
    model = build_encoder(backbone(family), device="cpu")
    rows = [{"video": noise(2), "text": "a"}, "words", {"video": noise(6, 1)}, {"image": picture("red"), "text": "x"}]
    columns = [f"query {number}" for number in range(4)], rows
    plain, cached = (
        run(HardNegativeInfoNCELoss(model, temperature=0.5, mini_batch_size=size), model, columns) for size in (None, 2)
    )
    assert_same_step(plain, cached, least=10, atol=2e-5)


def test_equal_videos_are_one_content(tmp_path):
    frames = noise(3)
    folder = stored(tmp_path / "video", frames)
    paths = [str(folder / f"frame_{number}.png") for number in range(3)]
    assert content_id({"video": str(folder)}) == content_id({"video": paths}) == content_id({"video": tuple(paths)})
    assert content_id({"video": paths}) != content_id({"video": paths[::-1]})
    assert content_id({"video": paths}) != content_id({"image": paths})
    assert content_id({"video": [paths, paths]}) != content_id({"video": paths * 2})
    assert content_id({"video": frames}) == content_id({"video": [frame.copy() for frame in frames]})
    assert Content({"video": [paths, str(folder)]}).frames == (3, 3)
    assert Content({"video": np.zeros((5, 4, 4, 3), np.uint8)}).frames == (5,)


def test_equal_videos_are_encoded_once(encoders, tmp_path):
    model = encoders("qwen2_vl")
    folder = stored(tmp_path / "video", noise(2))
    paths = [str(folder / f"frame_{number}.png") for number in range(2)]
    seen = []
    hook = model[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["input_ids"])))
    found = model.encode([{"video": str(folder)}, {"video": paths}, {"video": folder}])
    hook.remove()
    assert seen == [1]
    assert np.array_equal(found[0], found[1])


def test_the_trainer_takes_a_column_of_videos(backbone, tmp_path):
    """Folders of frames in a data set, with the sampler, which lets equal videos never meet, and GradCache."""
    folders = [str(stored(tmp_path / f"video{seed}", noise(4, seed))) for seed in range(4)]
    rows = [{"video": folders[row % 4], "text": None} for row in range(8)]
    train = Dataset.from_dict({"caption": [f"caption {row}" for row in range(8)], "video": rows})
    queries, targets = row_identities(train)
    assert (len(set(queries.tolist())), len(set(targets.tolist()))) == (8, 4)
    sampler = FalseNegativeAwareBatchSampler(train, 4, False)
    batches = list(sampler)
    assert sum(map(len, batches)) == 8
    assert all(len({row % 4 for row in batch}) == len(batch) for batch in batches)
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, report_to="none",
        batch_sampler=FalseNegativeAwareBatchSampler, save_strategy="no",
    )  # fmt: skip
    loss = HardNegativeInfoNCELoss(model, mini_batch_size=2)
    trained = SentenceTransformerTrainer(model, settings, train_dataset=train, loss=loss).train()
    assert np.isfinite(trained.training_loss)
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert any("visual" in name for name in changed)


def test_files(encoders, tmp_path):
    pytest.importorskip("av")
    frames = noise(20)
    path = write_file(tmp_path / "film.mkv", frames, rate=10)
    opened = open_video(str(path), VideoSettings(num_frames=4), None)
    assert (opened.indices, opened.total, opened.fps) == ([0, 6, 12, 19], 20, 10.0)
    for place, frame in zip(opened.indices, opened, strict=True):
        assert np.abs(np.asarray(frame, int) - np.asarray(frames[place], int)).max() <= 3
    assert open_video(path, VideoSettings(fps=2), None).indices == even_places(20, 4)
    assert open_video(path, VideoSettings(num_frames=3, fps=5), None).indices == even_places(20, 3)
    assert len(open_video(path, VideoSettings(num_frames=None), None)) == 20
    assert open_video(path, VideoSettings(max_pixels=300), None)[0].size == (20, 15)
    model = encoders("qwen2_vl", videos=VideoSettings(num_frames=4))
    named = model.encode([str(path), {"video": str(path)}])  # a bare path of a video is one, as in stock code
    assert np.array_equal(named[0], named[1])
    np.testing.assert_allclose(named[0], model.encode([{"video": list(opened)}])[0], atol=1e-5)
    assert np.abs(named[0] - model.encode([{"text": str(path)}])[0]).max() > 1e-3


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_files_beside_lists(encoders, family, tmp_path):
    """Some videos of a batch tell their rate, which decides what Qwen3-VL and SmolVLM say of time, others do not."""
    pytest.importorskip("av")
    path = write_file(tmp_path / "film.mkv", noise(12), rate=3)
    model = encoders(family, videos=VideoSettings(num_frames=4))
    items = [{"video": str(path)}, {"video": noise(4, 1)}, "words"]
    alone = np.concatenate([model.encode([item]) for item in items])
    np.testing.assert_allclose(model.encode(items), alone, atol=1e-5)


def test_what_cannot_be_opened_is_named(encoders, tmp_path):
    model = encoders("qwen2_vl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.mp4").write_bytes(b"torn")
    stored(tmp_path / "video", noise(2))
    (tmp_path / "video" / "frame_1.png").write_bytes(b"torn")
    for value, error, message in (
        (str(tmp_path / "none.mp4"), FileNotFoundError, r"Row 1: There is no .*none\.mp4"),
        (str(tmp_path / "empty"), UnreadableVideoError, "Row 1: The folder .*empty.* holds no frame"),
        (str(tmp_path / "torn.mp4"), UnreadableVideoError, r"Row 1: Cannot read the video .*torn\.mp4"),
        (str(tmp_path / "video"), ValueError, r"frame_1\.png \(row 1\)"),
        ([], ValueError, "Row 1: A video is an empty list"),
        (np.zeros((4, 4), np.uint8), TypeError, r"Row 1: A ndarray of shape \(4, 4\) is no video"),
        (7, TypeError, "Row 1: "),
    ):
        with pytest.raises(error, match=message):
            model.encode(["a text", {"video": value, "text": "a"}])


@pytest.mark.parametrize("family", STACKING)
def test_batches_that_a_family_cannot_stack_are_refused(encoders, family):
    model = encoders(family)
    with pytest.raises(ValueError, match=f"Row 0 has a video of 4 frames and row 1 one of 2, but the family {family}"):
        model.preprocess([{"video": noise(4)}, {"video": noise(2)}])
    if family == "smolvlm":
        with pytest.raises(ValueError, match="Row 1 has an image or no video"):
            model.preprocess([{"video": noise(4)}, "words"])
        with pytest.raises(ValueError, match="Row 0 has an image or no video"):
            model.encode([{"video": noise(4), "image": picture("red")}])


def test_settings_are_told_apart(backbone, tmp_path):
    model = build_encoder(backbone("qwen2_vl"), device="cpu")
    model.save_pretrained(str(tmp_path))
    plain, few = load_encoder(tmp_path), load_encoder(tmp_path, videos=VideoSettings(num_frames=2))
    assert model_fingerprint(plain) != model_fingerprint(few)
    assert len(few.preprocess([{"video": noise(8)}])["pixel_values_videos"]) < len(
        plain.preprocess([{"video": noise(8)}])["pixel_values_videos"]
    )
    few.save_pretrained(str(tmp_path / "few"))
    again = load_encoder(tmp_path / "few")
    assert again[0].videos == VideoSettings(num_frames=2)
    assert model_fingerprint(again) == model_fingerprint(few)
    other = VideoSettings(num_frames=3)
    assert load_encoder(tmp_path / "few", videos=other)[0].videos == other
    file = tmp_path / "few" / "unime_st_config.json"
    file.write_text(file.read_text().replace("num_frames", "frames"))
    with pytest.raises(ValueError, match=r"unime_st_config\.json is damaged: its `videos` are .*frames"):
        load_encoder(tmp_path / "few")
    for wrong in ({"num_frames": 0}, {"fps": 0}, {"fps": float("inf")}, {"max_pixels": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VideoSettings(**wrong)
    with pytest.raises(TypeError, match="`as_images=1`, but it is True or False"):
        VideoSettings(as_images=1)


@pytest.mark.parametrize("family", [*FAMILIES, *PLUGIN_FAMILIES])
def test_every_family_takes_the_frames_as_images(encoders, family, tmp_path):
    """Videos of differing lengths in one batch, with images and texts, are what their frames are as images."""
    model = encoders(family, videos=VideoSettings(num_frames=3, as_images=True))
    folder = stored(tmp_path / "video", noise(7, 9))
    chosen = [noise(7, 9)[place] for place in even_places(7, 3)]
    shown = [(noise(2), "a"), (noise(3, 1, (60, 20)), "bbbb"), (chosen, "c")]
    items = [
        *({"video": frames, "text": text} for frames, text in shown[:2]), {"video": str(folder), "text": "c"},
        "just words", {"image": picture("red"), "video": noise(2, 4), "text": "x"},
    ]  # fmt: skip
    together = model.encode(items)
    plain = [{"image": frames, "text": text} for frames, text in shown]
    plain += ["just words", {"image": [picture("red"), *noise(2, 4)], "text": "x"}]
    np.testing.assert_allclose(together, model.encode(plain), atol=1e-5)
    np.testing.assert_allclose(together, np.concatenate([model.encode([item]) for item in items]), atol=1e-5)
    assert np.abs(together[0] - model.encode([{"video": noise(2)[::-1], "text": "a"}])[0]).max() > 1e-5
    model.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_allclose(load_encoder(tmp_path / "saved", device="cpu").encode(items), together, atol=1e-5)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_rerankers_see_the_chosen_frames(family, tmp_path):
    """Pairs with videos, in batches with others and at a small budget, are scored as alone, from all chosen frames."""
    folder = tiny_backbone(family, tmp_path / "backbone", words=["Yes", "No"])
    judge = build_reranker(folder, device="cpu")
    frames = noise(5, 9)
    own = stored(tmp_path / "video", frames)
    pairs = [
        ("what?", {"video": noise(4), "text": "a"}), ({"video": noise(2, 1), "text": "q"}, "words"), ("a", "b"),
        ({"video": noise(4, 2)}, {"video": noise(4, 3)}), ("q", {"image": picture("red")}), ("q", {"video": str(own)}),
        ("q", {"video": frames}), ("q", {"video": frames[::-1]}), ("q", {"video": noise(20, 5)}),
        ("q", {"video": noise(20, 5)[:10]}),
    ]  # fmt: skip
    alone = np.array([judge.predict([pair])[0] for pair in pairs])
    for size in (32, 3):
        np.testing.assert_allclose(judge.predict(pairs, batch_size=size), alone, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unime_st.modules.reranker.cross_encoder.CPU_TOKENS", 16)
        np.testing.assert_allclose(judge.predict(pairs), alone, atol=1e-5)
    assert alone[5] == alone[6]
    assert min(abs(alone[6] - alone[7]), abs(alone[8] - alone[9])) > 1e-6
    uneven = [("q", "words"), ({"video": noise(4)}, {"video": noise(2)})]
    if family in STACKING:
        with pytest.raises(ValueError, match="Row 1 has a video of 4 frames and row 1 one of 2"):
            judge.predict(uneven)
    else:
        assert np.isfinite(judge.predict(uneven)).all()


def test_a_reranker_that_takes_no_videos_says_so(tmp_path):
    judge = build_reranker(tiny_backbone("llava_next", tmp_path / "backbone", words=["Yes", "No"]), device="cpu")
    with pytest.raises(ValueError, match="Row 1 has a video, but the family llava_next takes none"):
        judge.predict([("a", "b"), ("q", {"video": noise(2)})])


def test_a_film_that_was_cut_without_being_encoded_again(tmp_path):
    """Its file holds frames before the cut, back to a whole one, that no player shows."""
    av = pytest.importorskip("av")
    frames = noise(30, size=(64, 48))
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"sc_threshold": "1000000000"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "film.mp4")) as film, av.open(str(tmp_path / "cut.mp4"), "w") as container:
        source = film.streams.video[0]
        stream = container.add_stream_from_template(source)
        start = int(2 / source.time_base)
        film.seek(start, stream=source)
        for packet in film.demux(source):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, stream
                container.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert any(packet.is_discard for packet in container.demux(video=0))
    whole, cut = (open_video(tmp_path / name, VideoSettings(), None) for name in ("film.mp4", "cut.mp4"))
    assert (len(cut), cut.total) == (10, 10)
    assert all(np.array_equal(one, other) for one, other in zip(cut, whole[20:], strict=True))


def test_files_of_huge_frames_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("av")
    path = write_file(tmp_path / "film.mkv", noise(3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UnreadableVideoError, match=r"film\.mkv.* 40 x 30 pixels are more than 1000"):
        open_video(path, VideoSettings(max_pixels=100), None)


def test_frames_whose_names_have_one_number_stand_in_one_order(tmp_path):
    for name in ("f1.png", "f10.png", "f01.png", "f2.png", "F1.PNG"):
        (tmp_path / name).touch()
    assert [path.name for path in frame_files(tmp_path)] == ["F1.PNG", "f01.png", "f1.png", "f2.png", "f10.png"]


@pytest.mark.parametrize("video", [np.zeros((0, 4, 4, 3), np.uint8), torch.zeros(0, 3, 4, 4)])
def test_a_video_without_frames_is_refused(encoders, video):
    with pytest.raises(UnreadableVideoError, match="Row 1: A video has no frames"):
        encoders("qwen2_vl").encode(["a", {"video": video}])
