"""Bad arguments of models, losses, samplers, readers, corpora, mining and evaluators; and damaged files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from PIL import Image

from fuzz_cases import INF, NAN, Case, Things, calls, each, paths
from unime_st import build_encoder, export_encoder, functional, load_encoder
from unime_st import data as d
from unime_st import evaluation as e
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback
from unime_st.samplers import FalseNegativeAwareBatchSampler

# fmt: off
NO_INPUT: tuple[Any, ...] = (
    None, NAN, 5, ["a", "b", "c"], {}, {"text": 5}, {"text": NAN}, {"text": ["a"]}, {"image": 5}, {"image": b""},
    *({"image": array} for array in (
        np.zeros((2, 2, 7)), np.zeros(5), np.full((3, 3, 3), NAN), np.full((3, 3, 3), 300), np.zeros((3, 0, 3)),
        np.zeros((3, 3, 3), dtype=complex))),
    {"image": "data:image/png;base64,!!"}, object(), *([{"role": "user", "content": bad}] for bad in (5, [5])),
)
"""Inputs whose message must name their row."""
NAMED_INPUT: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ({"img": "x"}, ("img",)), ({"image": "none.png"}, ("none.png",)), ("none.png", ("none.png",)),
    ({"image": "a\0.png"}, ("row 1", "a\\x00")), ({"image": "x" * 5000}, ("row 1", "xxx")),
    ({"image": "\ud800"}, ("row 1", "\\ud800")), ({"image": Image.new("RGB", (2000, 3))}, ("row 1", "2000")),
    ({"image": "http://host/a.png"}, ("http://host/a.png",)), ({"text": "a <|image_pad|>"}, ("<|image_pad|>",)),
    ([{"role": "user"}], ("row 1", "content")), ({"video": "none.mp4"}, ("row 1", "none.mp4")),
    ({"text": "\ud800"}, ("row 1", "ud800")),
)
"""Inputs whose message must name what is wrong with them."""
OPENING = {"max_pixels": [0, -1, "x", NAN], "image_size": [0, (0, 5), (-1, 3), "x"],
           "max_aspect_ratio": [0, 0.5, NAN, "x"], "max_bad_images": [-1, "x", 3]}
FILES = {"a.json": b"{", "a.jsonl": b"[1]\nx", "a.parquet": b"PAR1", "a.csv": b"", "b.txt": b"\xff\xfe\xff"}
GOOD_ROW = {"qry": ["q"], "qry_image_path": [""], "pos_text": ["p"], "pos_image_path": [""]}
BAD_TABLES = ({**GOOD_ROW, "qry": [5]}, {"qry": ["q"]}, {name: [""] for name in GOOD_ROW},
              {**GOOD_ROW, "neg_txt": ["x"]})
TASK_LISTS = ("[]", "a: 5", "a: {}", "a: {dataset_parser: none}", "{", "a: {dataset_parser: image_qa, image_root: ..}")
SPLITS = ("[]", "{", "5", *(json.dumps({"images": rows}) for rows in ([5], [], [{"filename": "x", "split": "test"}])))


def cases(things: Things) -> Iterator[Case]:
    """All of them."""
    for part in (_models, _encode, _losses, _samplers, _functional, _readers, _data_files, _teachers, _corpora, _mining,
                 _evaluators, _files_of_evaluators, _caches):
        yield from part(things)


def _models(t: Things) -> Iterator[Case]:
    yield from paths("build_encoder", partial(build_encoder, device="cpu"), t)
    yield from each("build_encoder", partial(build_encoder, t.backbone, device="cpu"), max_pixels=[0, -1, "x", NAN],
                    max_seq_length=[0, -5, "x", NAN], prompt_template=[5, "nonsense"], peft_config=["lora", 5],
                    torch_dtype=["float3"], vision_cache_bytes=[-1, "x"], prompts=["a", 5, {1: 2}], device=["nowhere"])
    yield from paths("load_encoder", partial(load_encoder, device="cpu"), t)
    yield from each("export_encoder", lambda **bad: export_encoder(**{"model": t.model(), "path": t.new(), **bad}),
                    model=[None, "x", 5], path=[None, 5, t.file])


def _encode(t: Things) -> Iterator[Case]:
    def encode(item: Any) -> Any:
        return t.model().encode([{"text": "good"}, item], show_progress_bar=False)

    words = t.root / "words.png"
    words.write_bytes(b"no image")
    yield from calls("encode", encode, NO_INPUT, ("row 1",))
    yield from calls("encode", encode, ("", "  "), ("row 1",), harmless=True)  # refused, or as stock code embeds it
    files = (({"image": str(path)}, (path.name,)) for path in (words, t.root))
    for item, named in (*NAMED_INPUT, *files):
        yield from calls("encode", encode, (item,), named)
    encode_two = partial(t.model().encode, ["a", "b"], show_progress_bar=False)
    yield from each("encode", encode_two, batch_size=[0, -1, "x", 1.5],
                    truncate_dim=[0, -1, "x"], prompt=[5], prompt_name=["none"], batch_num_tokens=[0, -1, "x"])


def _losses(_: Things) -> Iterator[Case]:
    yield from each("HardNegativeInfoNCELoss", partial(HardNegativeInfoNCELoss, None),
                    temperature=[0, -1, NAN, INF, "x", None], margin=[NAN, "x", -INF],
                    num_hard_negatives=[0, -1, 1.5, "x"], mini_batch_size=[0, -1, 1.5, "x"],
                    mini_batch_num_tokens=[0, -5, "x"], negative_selection=["easiest", None])
    yield from each("DistillKLLoss", partial(DistillKLLoss, None, temperature=0.1), temperature=[0, -1, NAN, INF, "x"],
                    student_temperature=[0, -1, NAN], teacher_temperature=[0, NAN, "x"], direction=["sideways", None],
                    mini_batch_size=[0])
    yield from each("LossMetricsCallback", LossMetricsCallback, loss=[None, {}, 5])


def _samplers(t: Things) -> Iterator[Case]:
    def sampled(**bad: Any) -> Any:
        return list(FalseNegativeAwareBatchSampler(**{"dataset": t.rows, "batch_size": 2, "drop_last": False, **bad}))

    one_column = Dataset.from_dict({"anchor": ["a"]})  # as stage 1 has them: equal texts are kept apart
    yield from each("FalseNegativeAwareBatchSampler", sampled, harmless=(one_column,), dataset=[None, one_column],
                    batch_size=[0, -1, 1.5, "x"], world_size=[0, -1], margin=[NAN, "x"],
                    hard_negatives_together=[-1, 5, "x"], cluster_size=[0, 2, 2.0], max_rows_per_dataset=[0, -1],
                    guide_queries=["nowhere.npy", np.zeros((2, 3))])


def _functional(_: Things) -> Iterator[Case]:
    scores = torch.eye(3)
    hardest = partial(functional.hardest_valid_negatives, scores=scores, positive=torch.arange(3), k=1, margin=0.1)
    yield from each("hardest_valid_negatives", hardest, k=[0, -1], margin=[NAN])
    kl = partial(functional.in_batch_kl, scores, scores, student_temperature=0.1, teacher_temperature=0.1)
    yield from each("in_batch_kl", kl, direction=["sideways"], student_temperature=[0.0, NAN])


def _readers(t: Things) -> Iterator[Case]:
    images = t.world / "images"
    yield from each("ItemReader", partial(d.ItemReader, "images"), **OPENING)
    yield from each("load_mmeb_train", partial(d.load_mmeb_train, t.world / "train", image_root=images), **OPENING,
                    num_negatives=[-1, "x"], max_rows=[0, -1, "x"], split=["none", "../x", "*"],
                    subsets=[["None"], [], "Colours", 5], check_images=["maybe"])
    yield from paths("load_mmeb_train", d.load_mmeb_train, t)
    yield from each("load_mmeb_eval", partial(d.load_mmeb_eval, root=t.world / "eval", task="MSCOCO_t2i"),
                    task=["None", "", "../train/Colours"], split=["none", "../x"], max_pixels=[0], image_size=[0])
    names = ("../x.png", "/etc/hostname", "C:\\x.png", "none.png", "a\0.png", "x" * 300, "", ".")
    resolve = partial(d.resolve_image, images)
    yield from calls("resolve_image", resolve, names, lambda bad: (repr(bad)[1:60].strip("'"),))
    with_images = partial(d.with_images, dataset=t.rows)
    yield from each("with_images", with_images, image_columns=[["none"], ["a", "b"]], **OPENING)
    transformed = t.rows.with_transform(lambda batch: batch)
    for bad in (t.rows.to_iterable_dataset(), None, "rows", [{"anchor": "a"}], transformed):
        yield Case("with_images", f"dataset={type(bad).__name__}", partial(d.with_images, bad), ("dataset", "data set"))
    log = t.root / "log.jsonl"
    log.write_bytes(b"\xff{]\n{}\n[]\n")
    for shown, path in {"a damaged log": log, "no log": t.root / "none"}.items():
        yield Case("bad_image_report", shown, partial(d.bad_image_report, path), (), harmless=True)


def _data_files(t: Things) -> Iterator[Case]:
    yield from each("load_nli", partial(d.load_nli, source=t.world / "texts.txt"), max_rows=[0, -1, "x"],
                    columns=[["none"], [], "text"], source=[t.root / "none.csv", t.root / "empty", None, 5])
    for name, content in FILES.items():
        (t.root / name).write_bytes(content)
        yield Case("load_nli", f"damaged {name}", partial(d.load_nli, t.root / name), (name,))
    for number, bad in enumerate(BAD_TABLES):
        folder = t.root / f"mmeb-{number}"
        (folder / "A").mkdir(parents=True)
        pq.write_table(pa.table(bad), folder / "A" / "original-0.parquet")
        words = ("original-0.parquet", "A:")
        yield Case("load_mmeb_train", f"a table of {bad}"[:60], partial(d.load_mmeb_train, folder), words)
        task = {"qry_text": ["q"], "qry_img_path": [""], "tgt_text": [[]], "tgt_img_path": [["x"] * number]}
        pq.write_table(pa.table(task), folder / "A" / "test-0.parquet")
        words = ("row 0 of test-0.parquet",)
        yield Case("load_mmeb_eval", f"no text, {number} images", partial(d.load_mmeb_eval, folder, "A"), words)


class _Teacher:
    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def _teachers(t: Things) -> Iterator[Case]:
    def embeddings(**bad: Any) -> Any:
        good = {"teacher": _Teacher(), "texts": ["a", "b"], "teacher_name": "t", "cache_dir": t.new()}
        return d.teacher_embeddings(**{**good, **bad})

    yield from each("teacher_embeddings", embeddings, texts=["abc", [], [None], [5], [NAN], 5], teacher=[None, 5],
                    batch_size=[0, -1], shard_size=[0, -1], cache_dir=[t.file, None])
    arrays = (np.full((1, 3), NAN), np.zeros((2, 3)), np.zeros(3), np.zeros((1, 0)), "x", None)
    words = ("teacher", "row", "embedding", "label")
    yield from calls("with_teacher_labels", partial(d.with_teacher_labels, ["a"]), arrays, words, "{!r:.40}")


def _corpora(t: Things) -> Iterator[Case]:
    def corpus(inputs: Any = ("a", "bb"), **bad: Any) -> Any:
        good = {"model": _Teacher(), "output_dir": t.new(), "model_name": "t"}
        return d.encode_corpus(**{**good, "inputs": list(inputs) if isinstance(inputs, tuple) else inputs, **bad})

    yield from each("encode_corpus", corpus, window_size=[0, -1, 1.5, "x"], output_format=["csv", None],
                    dtype=["float8", "int8", None], cache_bytes=[-1, "x"], inputs=[None, 5, "ab"],
                    output_dir=[None, 5, t.file], model=[None, 5])
    rows = ([None], [{"image": "none.png"}], [{"img": 1}], [object()], [NAN])
    yield from calls("encode_corpus", corpus, rows, ("row 0",), "inputs={!r:.40}")
    pairs = ([(True, "a")], [(1.5, "a")], ["a"], [(None, "a")], [(1, "a"), ("2", "b")])
    yield from calls("encode_corpus", partial(corpus, with_ids=True), pairs, ("row", "id"), "ids of {}")
    made = corpus()
    numbers = ([5], [-3], [0.5], ["x"], [None], [True])
    yield from calls("EncodedCorpus.rows", made.rows, numbers, lambda bad: ("row", repr(bad[0])))
    yield from paths("load_corpus", d.load_corpus, t)
    for name, content in {"manifest": b"{", "list": b"[]", "other": b"{}"}.items():
        folder = t.root / f"corpus-{name}"
        folder.mkdir()
        for file in made.folder.glob("*.json"):
            (folder / file.name).write_bytes(content)
        yield Case("load_corpus", f"manifest {content!r}", partial(d.load_corpus, folder), (folder.name,))
    stream = partial(d.encode_stream, model=_Teacher(), inputs=["a"])
    yield from each("encode_stream", lambda **bad: list(stream(**bad)),
                    window_size=[0, -1, "x"], cache_bytes=[-1], inputs=[None, [None]])


def _mining(t: Things) -> Iterator[Case]:
    def mine(**bad: Any) -> Any:
        good = {"dataset": t.rows, "model": t.model(), "output_dir": t.new(), "num_negatives": 1}
        return d.mine_hard_negatives(**{**good, **bad})

    yield from each("mine_hard_negatives", mine, num_negatives=[0, -1, "x", 1.5], margin=[NAN, "x"],
                    range_min=[-1, 10, "x"], range_max=[0, -1], sampling_strategy=["bottom", None],
                    too_few=["ignore", None], search=["annoy"], batch_size=[0, -1], shard_size=[0, -1],
                    rows_per_file=[0, -1], dataset=[None, Dataset.from_dict({"anchor": ["a"]}), t.rows.select([])],
                    output_dir=[t.file])
    none = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["x", None]})
    yield Case("mine_hard_negatives", "a positive that is None", partial(mine, dataset=none), ("row 1", "positive"))
    yield from paths("load_mined_negatives", d.load_mined_negatives, t)


def _evaluators(t: Things) -> Iterator[Case]:
    def scored(evaluator: Any, **good: Any) -> Any:
        return lambda **bad: evaluator(**{**good, **bad})(t.model())

    images, captions = [t.image, Image.new("RGB", (20, 20), "blue")], [["a"], ["b"]]
    yield from each("ImageTextRetrievalEvaluator",
                    scored(e.ImageTextRetrievalEvaluator, images=images, captions=captions), images=[[], [t.image]],
                    captions=[[], [["a"], []], ["a", "b"], [[None], ["b"]], [[5], ["b"]], [["a"], None]],
                    ks=[(), (0,), (-1,), ("x",)], chunk_size=[0, -1], batch_size=[0, -1, "x"])
    row = (t.image, "a", "b")
    sets = [[], [row[:2]], [(t.image, None, "b")], [(None, "a", "b")], [(t.image, 5, "b")]]
    yield from each("SugarCrepeEvaluator", scored(e.SugarCrepeEvaluator, sets={"s": [row]}),
                    sets=[{}, *({"s": rows} for rows in sets[:-1]), [row], {"s": sets[-1]}],
                    groups=[{"G": ["none"]}, {"G": []}], batch_size=[0])
    yield from each("MMEBEvaluator", scored(e.MMEBEvaluator, root=t.world / "eval", image_root=t.world / "images"),
                    tasks=[["None"], [], [5]], on_error=["ignore", None], limit=[0, -1, "x"], max_pixels=[0, -1],
                    image_size=[0, (0, 1)], root=[t.root / "nowhere", t.root / "empty", t.file], batch_size=[0],
                    image_root=[t.root / "nowhere"])


def _files_of_evaluators(t: Things) -> Iterator[Case]:
    for number, text in enumerate(TASK_LISTS):
        path = t.root / f"tasks-{number}.yaml"
        path.write_text(text)
        make = partial(e.MMEBEvaluator.from_yaml, path, t.world / "eval")
        yield Case("MMEBEvaluator.from_yaml", text, make, (path.name,))
    for number, text in enumerate(SPLITS):
        path, folder = t.root / f"karpathy-{number}.json", t.root / f"crepe-{number}"
        path.write_text(text)
        make = partial(e.ImageTextRetrievalEvaluator.from_karpathy_split, path, t.world / "images")
        yield Case("from_karpathy_split", text, make, (path.name, "'x'"))
        folder.mkdir()
        (folder / "swap_att.json").write_text(text)
        make = partial(e.SugarCrepeEvaluator.from_folder, folder, t.world)
        yield Case("SugarCrepeEvaluator.from_folder", text, make, ("swap_att",))


def _caches(t: Things) -> Iterator[Case]:
    yield from each("encode_distinct", partial(e.encode_distinct, model=t.model(), items=["a"]),
                    items=[[], [None], [{"image": "none.png"}], [5]], batch_size=[0, -1], prompt_name=["none"])
    yield from each("EmbeddingCache", lambda **bad: e.EmbeddingCache(**{"folder": t.new(), **bad}),
                    max_bytes=[-1, "x", NAN], folder=[None, 5])
    yield from each("compare", partial(e.compare, before=t.root / "empty", after=t.root / "empty"),
                    before=[t.root / "nowhere", t.file, None])
