"""Encoders in mteb: stock and by our wrapper, on tasks made in memory, nothing downloaded."""

import json

import mteb
import numpy as np
import pytest
import torch
import yaml
from mteb.mocks import mock_tasks
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.models.model_implementations.unime_v2_models import UniMEV2Wrapper
from mteb.types import PromptType
from sentence_transformers import CrossEncoder, SentenceTransformer

from tiny import picture, tiny_backbone
from unime_st import (
    ListwiseReranker,
    build_encoder,
    build_reranker,
    export_encoder,
    export_reranker,
    load_encoder,
    load_reranker,
)
from unime_st.evaluation.mteb_models import (
    MTEBEncoder,
    eval_results,
    mteb_model_meta,
    mteb_reranker,
    rerank_with_mteb,
)
from unime_st.published import PUBLISHED

TASKS = (
    "MockSTSTask",
    "MockRetrievalTask",
    "MockClassificationTask",
    "MockAny2AnyRetrievalT2ITask",
    "MockAny2AnyRetrievalI2TTask",
    "MockImageTextPairClassificationTask",
    "MockImageClassificationTask",
)
NAME = "someone/tiny-unime"


@pytest.fixture(scope="module")
def checkpoint(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mteb") / "encoder"
    return export_encoder(build_encoder(backbone("llava_onevision"), device="cpu"), folder)


def task(name):
    return getattr(mock_tasks, name)()


@pytest.mark.parametrize("name", TASKS)
def test_an_exported_checkpoint_runs_unchanged(name, checkpoint):
    """Stock class, stock wrapper; and ours gives the same scores where no instruction is applied."""
    model = SentenceTransformer(str(checkpoint), device="cpu")
    if "image" in task(name).modalities:  # of a model in memory mteb takes texts for all it can do, unless told
        model = SentenceTransformerEncoderWrapper(model)
        model.mteb_model_meta = mteb_model_meta(checkpoint, NAME, register=False)
    stock = mteb.evaluate(model, task(name), cache=None)
    ours = mteb.evaluate(MTEBEncoder(load_encoder(str(checkpoint), device="cpu"), use_task_instructions=False),
                         task(name), cache=None)  # fmt: skip
    (one,), (two,) = stock.task_results, ours.task_results
    assert one.get_score() == pytest.approx(two.get_score(), abs=1e-3)
    assert np.isfinite(one.get_score())


def test_mteb_sees_the_modalities_of_a_checkpoint_on_the_hub(checkpoint):
    settings = json.loads((checkpoint / "sentence_bert_config.json").read_text())
    assert {"image", "text"} <= set(mteb.models.ModelMeta._detect_modalities_from_sbert_config(settings))


class Recording(SentenceTransformer):
    """Keeps what it is asked to encode."""

    seen = None

    def encode(self, items, **kwargs):
        self.seen = [*(self.seen or []), *items]
        return np.random.default_rng(0).normal(size=(len(items), 8)).astype(np.float32)


def test_the_tasks_instruction_reaches_the_model():
    model = Recording(modules=[torch.nn.Identity()])
    retrieval = task("MockRetrievalTask")
    retrieval.metadata = retrieval.metadata.model_copy(
        update={"prompt": {"query": "Find the answer.", "document": "Read."}}
    )
    mteb.evaluate(MTEBEncoder(model), retrieval, cache=None)
    starts = {item["text"].partition("\n")[0] for item in model.seen}
    assert starts == {"Find the answer.", "Read."}
    images = task("MockAny2AnyRetrievalI2TTask")
    images.metadata = images.metadata.model_copy(update={"prompt": "Describe."})
    model.seen = None
    mteb.evaluate(MTEBEncoder(model), images, cache=None)
    queries = [item for item in model.seen if "image" in item]
    assert queries
    assert all(item["text"].startswith("Describe.") for item in queries)
    assert not any("Describe." in item["text"] for item in model.seen if "image" not in item)  # documents
    model.seen = None
    mteb.evaluate(MTEBEncoder(model, use_task_instructions=False), images, cache=None)
    assert not any("Describe." in item.get("text", "") for item in model.seen)


def test_the_instruction_changes_the_embedding_and_keeps_the_models_own(checkpoint):
    encoder = MTEBEncoder(load_encoder(str(checkpoint), device="cpu"))
    metadata = task("MockSTSTask").metadata.model_copy(update={"prompt": "Compare."})
    batch = [{"text": ["a cat", "a dog"]}]
    arguments = {"hf_split": "test", "hf_subset": "default", "prompt_type": PromptType.query}
    told = encoder.encode(batch, task_metadata=metadata, **arguments)
    bare = encoder.encode(batch, task_metadata=metadata.model_copy(update={"prompt": None}), **arguments)
    assert np.abs(told - bare).max() > 1e-3
    np.testing.assert_allclose(told, encoder.model.encode(["Compare.\na cat", "Compare.\na dog"]), atol=1e-5)
    rendered = encoder.model.tokenizer.decode(encoder.model.preprocess([{"text": "Compare.\na cat"}])["input_ids"][0])
    assert rendered.index("Compare.") < rendered.index("a cat") < rendered.index("Summary above sentence in one word:")


def test_meta_registers_and_files_results(checkpoint, tmp_path):
    meta = mteb_model_meta(checkpoint, NAME, license="apache-2.0")
    assert mteb.get_model_meta(NAME) == meta
    assert (meta.embed_dim, meta.modalities, meta.use_instructions) == (32, ["text", "image"], True)
    other = build_encoder_with_other_weights(checkpoint)
    assert mteb_model_meta(other, NAME, register=False).revision != meta.revision
    cache = mteb.ResultCache(tmp_path) if hasattr(mteb, "ResultCache") else mteb.cache.ResultCache(tmp_path)
    mteb.evaluate(meta, task("MockSTSTask"), cache=cache)
    (file,) = tmp_path.rglob("MockSTSTask.json")
    assert meta.revision in file.parts
    assert "someone__tiny-unime" in file.parts
    with pytest.raises(ValueError, match="organisation/model"):
        mteb_model_meta(checkpoint, "no-slash")


def build_encoder_with_other_weights(checkpoint):
    model = load_encoder(str(checkpoint), device="cpu")
    next(model.parameters()).data.add_(0.01)
    return model


def test_results_as_card_metadata(checkpoint):
    tasks = [task("MockSTSTask"), task("MockImageClassificationTask")]
    found = mteb.evaluate(MTEBEncoder(load_encoder(str(checkpoint), device="cpu")), tasks, cache=None).task_results
    entries = eval_results(found, tasks)
    assert [entry.dataset_name for entry in entries] == [f"MTEB {one.metadata.name}" for one in tasks]
    assert [entry.metric_value for entry in entries] == [
        pytest.approx(100 * result.get_score(), abs=1e-3) for result in found
    ]
    assert entries[1].task_type == "image-classification"
    with pytest.raises(ValueError, match="none of the tasks"):
        eval_results(found, tasks[:1])


def test_the_example_writes_report_and_metadata(checkpoint, tmp_path, capsys, monkeypatch):
    import importlib
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    sys.modules.pop("evaluate_mteb", None)
    main = importlib.import_module("evaluate_mteb").main
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n# mine\n")
    arguments = [str(checkpoint), "--name", NAME, "--output", str(tmp_path / "out"), "--card", str(card)]
    main(arguments, [task("MockSTSTask"), task("MockAny2AnyRetrievalT2ITask")])
    assert f"wrote {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    by_task = report["sections"][0]
    assert [row[0] for row in by_task["rows"]] == ["MockSTSTask", "MockAny2AnyRetrievalT2I"]
    metadata = yaml.safe_load(card.read_text().split("---")[1])
    assert metadata["license"] == "mit"
    assert metadata["model-index"][0]["name"] == NAME
    assert len(metadata["model-index"][0]["results"]) == 2
    with pytest.raises(SystemExit):
        main(arguments)


def test_agreement_with_mtebs_own_wrapper(backbone, monkeypatch):
    """UniME-V2's prompts and resolution: images forced to the wrapper's square, the task's instruction as prompt."""
    folder = backbone("llava_onevision")
    monkeypatch.setattr("mteb.models.model_implementations.unime_v2_models._IMAGE_SIZE", (56, 56))
    theirs = UniMEV2Wrapper(str(folder), device="cpu", dtype=torch.float32)
    theirs.processor.chat_template = TEMPLATE
    ours = load_encoder(folder, published="TianchengGu/UniME-V2-LLaVA-OneVision-8B", device="cpu")
    images = [picture("red", (80, 30)), picture("green", (30, 90)), picture("yellow")]
    texts = ["What is it?", "a much longer question about the picture", "x\n"]
    columns = {"text": texts, "image": images}
    for kind, instruction in [
        (kind, words) for kind in ({"text"}, {"image"}, {"text", "image"}) for words in ("Find it.", None)
    ]:
        metadata = task("MockSTSTask").metadata.model_copy(update={"prompt": instruction or {"document": "x"}})
        batch = {name: columns[name] for name in kind}

        class Loader(list):
            class dataset:
                features = kind

        arguments = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "x", "prompt_type": PromptType.query}
        expected = theirs.encode(Loader([batch]), show_progress_bar=False, **arguments).numpy()
        items = [
            {name: columns[name][row] if name == "text" else images[row].resize((56, 56)) for name in kind}
            for row in range(3)
        ]
        np.testing.assert_allclose(ours.encode(items, prompt=instruction), expected, atol=1e-5)
        arguments["task_metadata"] = metadata
        wrapped = MTEBEncoder(ours, image_size=56).encode(Loader([batch]), **arguments)
        np.testing.assert_allclose(wrapped, expected, atol=1e-5)
        distances = np.abs(expected[:, None] - expected[None]).max(-1)[np.triu_indices(3, 1)]
        assert distances.min() > 1e-4


def test_where_mteb_adds_an_instruction_of_its_own_ours_follows_the_authors(backbone, monkeypatch):
    """A task without an instruction: their scripts give a query bare, mteb begins it with words of its own."""
    folder = backbone("llava_onevision")
    theirs = UniMEV2Wrapper(str(folder), device="cpu", dtype=torch.float32)
    theirs.processor.chat_template = TEMPLATE
    ours = load_encoder(folder, published="TianchengGu/UniME-V2-LLaVA-OneVision-8B", device="cpu")
    metadata = task("MockSTSTask").metadata.model_copy(update={"prompt": None})

    class Loader(list):
        class dataset:
            features = ("text",)

    arguments = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "x", "prompt_type": PromptType.query}
    expected = theirs.encode(Loader([{"text": ["a cat", "a dog"]}]), show_progress_bar=False, **arguments).numpy()
    found = MTEBEncoder(ours).encode([{"text": ["a cat", "a dog"]}], **arguments)
    np.testing.assert_allclose(found, ours.encode(["a cat", "a dog"]), atol=1e-6)
    assert np.abs(found - expected).max() > 1e-3
    words = "Represent the given input for retrieval.\n"
    np.testing.assert_allclose(ours.encode([words + "a cat", words + "a dog"]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("published", "size"),
    [
        ("TianchengGu/UniME-V2-LLaVA-OneVision-8B", (1344, 1344)),
        ("TianchengGu/UniME-V2-Qwen2VL-2B", (1344, 1344)),
        ("DeepGlint-AI/UniME-LLaVA-OneVision-7B", None),
    ],
)
def test_published_models_are_evaluated_at_their_authors_resolution(published, size, backbone, monkeypatch):
    folder = backbone(PUBLISHED[published].family)
    wrapped = MTEBEncoder(str(folder), device="cpu", published=published)
    assert wrapped.image_size == size
    assert MTEBEncoder(str(folder), device="cpu", published=published, image_size=(8, 9)).image_size == (8, 9)
    shown = []
    monkeypatch.setattr(wrapped.model, "encode", lambda items, **_: shown.extend(items) or np.zeros((len(items), 2)))
    arguments = {"task_metadata": task("MockSTSTask").metadata, "hf_split": "test", "hf_subset": "x"}
    wrapped.encode([{"image": [picture("red", (40, 30)), None], "text": ["a", "b"]}], **arguments)
    assert shown[0]["image"].size == (size or (40, 30))
    assert "image" not in shown[1]
    with pytest.raises(ValueError, match="`image_size=0`, but both sides must be at least 1"):
        MTEBEncoder(str(folder), device="cpu", published=published, image_size=0)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ '\\n' + part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)
"""Stands for the published chat template, which a tiny processor has not; used by the wrapper."""


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mteb_reranker")
    judge = build_reranker(tiny_backbone("qwen2_vl", folder / "backbone", words=["Yes", "No"]), device="cpu")
    return export_reranker(judge, folder / "reranker")


class Seen(CrossEncoder):
    """A stock reranker that remembers the pairs it is shown."""

    def predict(self, inputs, **options):
        self.pairs = [*getattr(self, "pairs", []), *inputs]
        return super().predict(inputs, **options)


@pytest.mark.parametrize("name", ["MockRetrievalTask", "MockAny2AnyRetrievalT2ITask"])
def test_mteb_reranks_by_its_two_stages(name, checkpoint, reranker_folder, tmp_path):
    encoder = MTEBEncoder(load_encoder(str(checkpoint), device="cpu"))
    mteb.evaluate(encoder, task(name), cache=None, prediction_folder=tmp_path)
    scores = []
    for model in (load_reranker(reranker_folder, device="cpu"), Seen(str(reranker_folder), device="cpu")):
        wrapper = mteb_reranker(model, "someone/reranker")
        (found,) = rerank_with_mteb(wrapper, [task(name), task("MockSTSTask")], tmp_path, depth=2)
        scores.append(found.get_score())
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    (file,) = tmp_path.glob("*predictions.json")
    splits = json.loads(file.read_text())["default"].values()
    assert len(model.pairs) == sum(min(2, len(found)) for split in splits for found in split.values())
    if "T2I" in name:
        assert all("image" in document for _, document in model.pairs), "mteb left the images out"
    for depth in (1, 0, -1):
        with pytest.raises(ValueError, match=f"depth={depth}"):
            rerank_with_mteb(wrapper, [task(name)], tmp_path, depth=depth)
    with pytest.raises(FileNotFoundError, match="Can't find previous results"):
        rerank_with_mteb(wrapper, [task(name)], tmp_path / "none")


def test_mteb_asks_for_pairs_so_a_listwise_reranker_is_refused(reranker_folder):
    with pytest.raises(TypeError, match=r"is a ListwiseReranker, but mteb asks for scores of pairs"):
        mteb_reranker(ListwiseReranker(load_reranker(reranker_folder, device="cpu")), "someone/reranker")


def test_mtebs_hook_on_a_head_of_low_precision_is_left_alone(reranker_folder):
    """It computes the two answers' columns anew, in the whole head's output; ours would have computed these alone."""
    model = load_reranker(reranker_folder, device="cpu", torch_dtype="bfloat16")
    plain = model.predict([("a", "b"), ("a", "c")])
    mteb_reranker(model, "someone/reranker")
    assert model[0].model.get_output_embeddings()._forward_hooks
    assert model.predict([("a", "b"), ("a", "c")]) == pytest.approx(plain, abs=0.02)


def test_the_example_reranks(checkpoint, reranker_folder, tmp_path, monkeypatch):
    import importlib
    import sys
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    sys.modules.pop("evaluate_mteb", None)
    main = importlib.import_module("evaluate_mteb").main
    arguments = [str(checkpoint), "--name", NAME, "--output", str(tmp_path / "out")]
    main(arguments, [task("MockAny2AnyRetrievalT2ITask")])  # results without predictions, which mteb keeps
    tasks = [task("MockSTSTask"), task("MockAny2AnyRetrievalT2ITask")]
    main([*arguments, "--reranker", str(reranker_folder), "--rerank-depth", "2"], tasks)
    sections = json.loads((tmp_path / "out" / "report.json").read_text())["sections"]
    shown = next(section for section in sections if section["title"] == "Retrieval, reranked")
    (first,) = (tmp_path / "out" / "predictions").iterdir()
    other = build_encoder(tiny_backbone("qwen2_vl", tmp_path / "other"), device="cpu")
    again = [str(export_encoder(other, tmp_path / "encoder")), *arguments[1:], "--reranker", str(reranker_folder)]
    main(again, [task("MockAny2AnyRetrievalT2ITask")])  # another encoder's predictions are kept apart
    folders = [first, *({*first.parent.iterdir()} - {first})]
    told = [json.loads(next(path.glob("*.json")).read_text())["mteb_model_meta"]["revision"] for path in folders]
    assert told == [path.name for path in folders]
    assert len(told) == 2
    ((name, before, after, change, seconds),) = shown["rows"]
    assert name == "MockAny2AnyRetrievalT2I"
    assert change == pytest.approx(after - before)
    assert seconds is not None
