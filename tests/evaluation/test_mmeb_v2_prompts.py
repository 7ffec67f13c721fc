"""MMEB V2 with Qwen3-VL-Embedding's prompts: golden inputs and prompts, scores against a plain loop, caches."""

import logging
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_fakes import HashModel

from mmeb_v2_data import drawing, write_v2
from unime_st import load_encoder
from unime_st.data.mmeb.named_rows import NamedRow, task_of
from unime_st.data.mmeb.video_rows import _without_letters
from unime_st.evaluation import MMEBEvaluator, compare, read_settings
from unime_st.evaluation.mmeb.tasks import META_TASKS, MMEBTask
from unime_st.evaluation.mmeb.v2 import DOCUMENT_TASKS, V2_META_TASKS, v2_tasks

OWN = "qwen3_vl_embedding"
CHOOSE = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer."
)
MOMENT = "Find the clip that corresponds to the described scene in the given video."
PAGE = "Find a document image that matches the given query."
# task -> instruction and text of the first row's query, text of its first candidate; "" for what is not said
GOLDEN = {
    "K700": ("Recognize the category of the video content.", "", "parkour"),
    "SmthSmthV2": (
        "What actions or object interactions are being performed by the person in the video?", "", "Moving it"
    ),
    "HMDB51": ("What actions or objects interactions are the person in the video doing?", "", "ride_bike"),
    "UCF101": ("What activities or sports are being performed by the person in the video?", "", "Kayaking"),
    "Breakfast": ("Recognize the breakfast type that the person is cooking in the video.", "", "tea"),
    "MVBench": (CHOOSE, "What episodic_reasoning?\nOptions:\n(A) Up.\n(B) Down.", "(A) Up."),
    "Video-MME": (CHOOSE, "How many?\nA. One cat.\nB. Two cats.\nC. No cat.\nD. A dog.", "One cat"),
    "NExTQA": (
        CHOOSE,
        "why\nOptions:\n(A) because 0\n(B) because 1\n(C) because 2\n(D) because 3\n(E) because 4",
        "(A) because 0",
    ),
    "EgoSchema": (CHOOSE, "What is done? A. One cat. B. Two cats. C. No cat. D. A dog.", "One cat"),
    "ActivityNetQA": (CHOOSE, "is it day? (A) yes; (B) no.", "yes"),
    "DiDeMo": ("Find a video that includes the following described scenes.", "the sea 1", ""),
    "MSR-VTT": ("Find a video that contains the following visual content.", "a man 7", ""),
    "MSVD": ("Find the video snippet that corresponds to the given summary.", "a dog 1", ""),
    "VATEX": ("Select a video that fits the description provided.", "people 1", ""),
    "YouCook2": ("Find a video that demonstrates the following action while making a recipe.", "stir 1", ""),
    "QVHighlight": (MOMENT, "she laughs 1", ""),
    "Charades-STA": (MOMENT, "she laughs 1", ""),
    "MomentSeeker": ("Find the clip that corresponds to the given text.", "the goal", ""),
    **{task.name: (PAGE, "which 0?", "") for task in DOCUMENT_TASKS},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_v2(tmp_path_factory.mktemp("v2"))


@pytest.fixture(scope="module")
def encoder(backbone):
    return load_encoder(backbone("qwen3_vl"), published="Qwen/Qwen3-VL-Embedding-2B", device="cpu")


def loaded(root, name, **options):
    (task,) = v2_tasks(root, [name], **{"task_prompts": OWN, **options})
    return task.load(on_error="raise")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_inputs(world, name):
    task, before = loaded(world, name), loaded(world, name, task_prompts="vlm2vec")
    instruction, text, candidate = GOLDEN[name]
    query = int(task.queries[0])
    assert task.instructions[query] == instruction
    assert task.items[query].get("text", "") == text
    assert task.items[task.own(0)[0]].get("text", "") == candidate
    assert not set(task.instructions) - set(task.queries.tolist())  # queries alone are instructed
    for one, other in zip(before.queries, task.queries, strict=True):  # and shown the same frames and images
        for kind in ("image", "video"):
            assert task.items[other].get(kind) == before.items[one].get(kind)
    assert [len(task.right_of(row)) for row in range(2)] == [len(before.right_of(row)) for row in range(2)]
    assert (task.corpus is None) == (before.corpus is None)


def test_golden_queries_of_moment_seeker(world):
    task = loaded(world, "MomentSeeker")
    assert [task.instructions[int(query)] for query in task.queries] == [
        "Find the clip that corresponds to the given text.",
        "Select the video clip that aligns with the given text and image.",
        "Find the clip that corresponds to the given sentence and video segment.",
    ]
    assert [sorted(task.items[query]) for query in task.queries] == [["text"], ["image", "text"], ["text", "video"]]


def image_rows(root, name, *table):
    """Rows of an image task, with their images."""
    folder = root / "annotation/ziyjiang/MMEB_Test_Instruct" / name
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(list(table)), folder / "test-00000-of-00001.parquet")
    for row in table:
        for path in (row["qry_img_path"], *row["tgt_img_path"]):
            if path:
                drawing(root / "image-tasks" / path, path)
    return loaded(root, name)


def image_row(told, text, image="", texts=(), images=()):
    return {"qry_inst": told, "qry_text": text, "qry_img_path": image, "tgt_text": list(texts),
            "tgt_img_path": list(images or [""] * len(texts)), "tgt_inst": "<|image_1|>\nRepresent it."}  # fmt: skip


def said(task):
    """The first query's instruction, texts of it and its candidates, None where there is none; which have images."""
    query = int(task.queries[0])
    items = [task.items[query], *(task.items[item] for item in task.own(0))]
    return task.instructions.get(query), [item.get("text") for item in items], ["image" in item for item in items]


def test_golden_image_tasks(tmp_path):
    row = image_row("<|image_1|>\nRepresent the given image for classification\n", "", "a.jpg", ["tea ", "a cup"])
    assert said(image_rows(tmp_path, "N24News", row)) == (
        "Represent the given image for classification", [None, "tea ", "a cup"], [True, False, False]
    )  # fmt: skip
    row = image_row("<|image_1|>\nRepresent the image with the question:", "Why?\n", "a.jpg", ["so"])
    assert said(image_rows(tmp_path, "GQA", row)) == (
        "Represent the image with the question:", ["Why?\n", "so"], [True, False]
    )  # fmt: skip
    row = image_row("Find the page.", "who?", "", [" a king\n", ""], ["1.jpg", "2.jpg"])
    assert said(image_rows(tmp_path, "WebQA", row)) == (
        "Find the page.", ["who?", "a king", None], [False, True, True]
    )  # fmt: skip
    row = image_row("<|image_1|> Select the part.", '"dog"', "a.jpg", ['"dog" ', '"cat"'], ["1.jpg", "2.jpg"])
    assert said(image_rows(tmp_path, "RefCOCO-Matching", row)) == (
        "Select the part.", ['"dog"', '"dog" ', '"cat"'], [True, True, True]
    )  # fmt: skip
    row = image_row("Find the twin.", "", "a.jpg", [" ", ""], ["1.jpg", "2.jpg"])
    assert said(image_rows(tmp_path, "NIGHTS", row)) == ("Find the twin.", [None] * 3, [True] * 3)
    row = image_row("", "q <|image_1|>", "a.jpg", ["so"])
    assert said(image_rows(tmp_path, "VizWiz", row)) == (None, ["q ", "so"], [True, False])


def test_one_image_with_two_captions_is_two_candidates(tmp_path):
    """The published code knows candidates by their image, and embeds the first caption for both."""
    rows = [image_row("Find it.", f"q{n}", "", [f"caption {n}", "x"], ["1.jpg", "2.jpg"]) for n in (0, 1)]
    task = image_rows(tmp_path, "EDIS", *rows)
    assert [task.items[task.right_of(row)[0]]["text"] for row in (0, 1)] == ["caption 0", "caption 1"]


def test_rows_without_a_column_of_instructions_are_refused(tmp_path):
    row = image_row("", "Represent it: a", "a.jpg", ["b"])
    del row["qry_inst"]
    with pytest.raises(ValueError, match=r"VOC2007: .* has no column qry_inst"):
        image_rows(tmp_path, "VOC2007", row)


def test_one_content_under_two_instructions_and_under_none_is_three_inputs(tmp_path):
    def read(instruction):
        return NamedRow({"text": "a"}, {"a": {"text": "a"}, "b": {"text": "b"}}, {"a": 1}, instruction)

    named = task_of("t", ["One.", "Two.", "One."], read)
    rows = [image_row(told, "a", "", ["a", "b"]) for told in ("One.", "Two.", "One.")]
    for task in (named, image_rows(tmp_path, "GQA", *rows)):
        assert [item["text"] for item in task.items].count("a") == 3
        assert [task.instructions.get(int(query)) for query in task.queries] == ["One.", "Two.", "One."]
        assert len(set(task.queries.tolist())) == 2
        evaluator = MMEBEvaluator(None, [MMEBTask("t", lambda task=task, *, on_error: task)], name="")
        model = HashModel()
        evaluator(model)
        assert len(model.encoded) == 4  # with "b"


def test_an_option_without_a_letter_stays():
    """It lost all but its last character."""
    assert _without_letters(["A. a dog.", "No cat"]) == {"A. a dog.": {"text": "a dog"}, "No cat": {"text": "No cat"}}


def rendered(encoder, item):
    """The prompt; the tokens of a medium once, and moments of a video left out."""
    tokens = encoder[0].preprocess([item])["input_ids"][0]
    prompt = encoder.tokenizer.decode(tokens, skip_special_tokens=False)
    prompt = re.sub(r"(<\|(?:image|video)_pad\|>)\1*", r"\1", prompt)
    prompt = re.sub(r"<[\d.]+ seconds>", "", prompt)
    return re.sub(
        r"(<\|vision_start\|>)*(<\|vision_start\|><\|video_pad\|><\|vision_end\|>)+(<\|vision_end\|>)*", "VIDEO", prompt
    )


START, BETWEEN, END = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PLAIN = f"{START}Represent the user's input.{BETWEEN}"


@pytest.mark.parametrize(
    ("name", "row", "query", "candidate"),
    [
        ("VOC2007", 0, f"{START}Answer for VOC2007:{BETWEEN}{IMAGE}question 0{END}", f"{PLAIN}answer 0{END}"),
        ("K700", 0, f"{START}Recognize the category of the video content.{BETWEEN}VIDEO{END}", f"{PLAIN}parkour{END}"),
        (
            "NExTQA", 0,
            f"{START}{CHOOSE}{BETWEEN}VIDEO{GOLDEN['NExTQA'][1]}{END}",
            f"{PLAIN}(A) because 0{END}",
        ),
        (
            "MSVD", 0, f"{START}Find the video snippet that corresponds to the given summary.{BETWEEN}a dog 1{END}",
            f"{PLAIN}VIDEO{END}",
        ),
        ("QVHighlight", 0, f"{START}{MOMENT}{BETWEEN}VIDEOshe laughs 1{END}", f"{PLAIN}VIDEO{END}"),
        (
            "MomentSeeker", 1,
            f"{START}Select the video clip that aligns with the given text and image.{BETWEEN}{IMAGE}the goal{END}",
            f"{PLAIN}VIDEO{END}",
        ),
        ("ViDoRe_docvqa", 0, f"{START}{PAGE}{BETWEEN}which 0?{END}", f"{PLAIN}{IMAGE}{END}"),
    ],
)  # fmt: skip
def test_golden_prompts(world, encoder, name, row, query, candidate):
    task = loaded(world, name)
    assert rendered(encoder, task.asked(int(task.queries[row]))) == query
    assert rendered(encoder, task.asked(int(task.own(row)[0]))) == candidate


def by_hand(encoder, task, metric):
    """Scores of all rows: each input alone, its instruction as the prompt of `encode`; cosines in plain Python."""

    def embedded(item):
        return encoder.encode([task.items[item]], prompt=task.instructions.get(item), batch_size=1)[0].astype(float)

    scores = []
    for place, query in enumerate(task.queries.tolist()):
        shown = (task.own(place) if task.corpus is None else task.corpus).tolist()
        gain = dict(zip(task.own(place).tolist(), task.gains_of(place).tolist(), strict=True))
        cosines = [float(embedded(query) @ embedded(item)) for item in shown]
        ranked = [item for _, item in sorted(zip(cosines, shown, strict=True), key=lambda one: -one[0])]
        if metric == "hit@1":
            scores.append(float(gain.get(ranked[0], 0) > 0))
        else:
            dcg = sum(gain.get(item, 0) / math.log2(at + 2) for at, item in enumerate(ranked[:5]))
            scores.append(dcg / sum(one / math.log2(at + 2) for at, one in enumerate(sorted(gain.values())[::-1])))
    return scores


KINDS = ["VOC2007", "SmthSmthV2", "NExTQA", "ActivityNetQA", "MSVD", "QVHighlight", "MomentSeeker", "ViDoRe_docvqa"]


@pytest.mark.parametrize("batch_size", [1, 32])
def test_scores_are_those_of_a_plain_loop(world, encoder, batch_size):
    evaluator = MMEBEvaluator.v2(world, KINDS, task_prompts=OWN, num_frames=64, batch_size=batch_size, name="")
    metrics = evaluator(encoder)
    assert metrics["tasks"] == len(KINDS)
    found = {name: evaluator.results[name].scores.tolist() for name in KINDS}
    for name in KINDS:
        expected = by_hand(encoder, loaded(world, name, num_frames=64), evaluator.results[name].metric)
        np.testing.assert_allclose(found[name], expected, atol=1e-9, err_msg=name)
    assert 0 < np.mean([score for own in found.values() for score in own]) < 1


def test_all_78_tasks(world):
    evaluator = MMEBEvaluator.v2(world, task_prompts=OWN, num_frames=64, name="", on_error="report")
    metrics = evaluator(HashModel())
    assert (metrics["tasks"], metrics["unreadable_rows"]) == (78, 0)
    assert set(GOLDEN) | set(META_TASKS) == set(V2_META_TASKS)
    other = MMEBEvaluator.v2(world, num_frames=64, name="")(HashModel())
    assert metrics["overall_mean"] != other["overall_mean"]


def test_the_cache_knows_the_instructions(world, tmp_path):
    names, model = ["K700", "NExTQA", "MSR-VTT"], HashModel()

    def encoded(task_prompts, only=names):
        model.encoded.clear()
        MMEBEvaluator.v2(world, only, task_prompts=task_prompts, cache_dir=tmp_path)(model)
        return list(model.encoded)

    first, second = encoded("vlm2vec"), encoded(OWN)
    assert sum(isinstance(item, list) for item in first) == 0
    queries = [item for item in second if isinstance(item, list)]
    assert len(queries) == 2 + 1 + 2  # both rows of NExTQA ask the same
    assert {"text": "parkour"} in first
    assert {"text": "parkour"} not in second
    assert encoded(OWN) == encoded("vlm2vec") == []
    # one video under another instruction is another input
    assert len(encoded(OWN, ["UCF101"])) == 2 + 101
    (stored,) = (item for item in queries if item[0]["content"].startswith("Given"))
    assert stored[1]["content"][0]["type"] == "video"


def test_settings_and_comparisons_tell_the_prompts(world, encoder, tmp_path):
    for task_prompts in ("vlm2vec", OWN):
        MMEBEvaluator.v2(world, ["ViDoRe_docvqa"], task_prompts=task_prompts)(encoder, str(tmp_path / task_prompts))
    (path,) = (tmp_path / OWN).glob("*_rows.parquet")
    assert read_settings(path)["task_prompts"] == OWN
    found = compare(tmp_path / "vlm2vec", tmp_path / OWN, resamples=10).other_settings
    assert found == {"MMEB-V2: task_prompts": ('"vlm2vec"', f'"{OWN}"')}
    assert "task_prompts" not in MMEBEvaluator(None, v2_tasks(world, ["K700"])).get_config_dict()


def test_rerankers_and_galleries_see_the_instruction_before_the_text(world):
    asked = []

    class Judge:
        def predict(self, pairs, **_):
            asked.extend(pairs)
            return np.arange(len(pairs), dtype=np.float32)

    evaluator = MMEBEvaluator.v2(world, ["QVHighlight", "K700"], task_prompts=OWN, reranker=Judge(), rerank_depth=3)
    evaluator(HashModel())
    texts = {query["text"] for query, _ in asked}
    assert texts == {f"{MOMENT} she laughs {n}" for n in (1, 2)} | {"Recognize the category of the video content."}
    assert all("video" in query for query, _ in asked)
    entry = evaluator.top("QVHighlight")[0]
    assert entry["query"]["text"] == f"{MOMENT} she laughs 1"
    assert len(entry["query"]["video"]) == 8
    assert all(sorted(result) == ["right", "video"] for result in entry["results"])


def test_images_and_frames_are_resized_beside_an_instruction(world):
    sizes = []

    class Sees(HashModel):
        def vector(self, item, prompt=""):
            if isinstance(item, list):
                content = item[1]["content"]
                sizes.extend(
                    frame.size for part in content for frame in part.get("video", [part.get("image")]) if frame
                )
            return super().vector(repr(item)[:80], prompt)

    MMEBEvaluator.v2(world, ["UCF101", "VOC2007"], task_prompts=OWN, image_size=10)(Sees())
    assert len(sizes) == 16 + 2
    assert set(sizes) == {(10, 10)}


def test_an_encoder_of_that_template_is_told_of_its_prompts(world, encoder, caplog):
    def warnings(model, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "unime_st"):
            MMEBEvaluator.v2(world, ["ViDoRe_docvqa"], **options)(model)
        return [record.message for record in caplog.records if "task_prompts" in record.message]

    (told,) = warnings(encoder)
    assert 'task_prompts="qwen3_vl_embedding", num_frames=64' in told
    assert warnings(encoder, task_prompts=OWN) == warnings(HashModel()) == []


def test_unknown_prompts_are_refused(world):
    with pytest.raises(ValueError, match="`task_prompts='qwen'`; choose 'vlm2vec' or 'qwen3_vl_embedding'"):
        MMEBEvaluator.v2(world, task_prompts="qwen")
