"""Bad arguments and damaged files of readers, corpora, mining and evaluators."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image

from fuzz_cases import NAN, Case, Things, each, paths
from unime_st import evaluation as e
from unime_st.data import (
    ItemReader,
    bad_image_report,
    encode_corpus,
    encode_stream,
    load_corpus,
    load_mined_negatives,
    load_mmeb_eval,
    load_mmeb_train,
    load_nli,
    mine_hard_negatives,
    resolve_image,
    teacher_embeddings,
    with_images,
    with_teacher_labels,
)


def data_cases(things: Things) -> Iterator[Case]:
    """All of them."""
    for part in (_readers, _data_files, _corpora, _mining, _evaluators):
        yield from part(things)


def _readers(t: Things) -> Iterator[Case]:

    options = {
        "max_pixels": [0, -1, "x", NAN],
        "image_size": [0, (0, 5), (-1, 3), "x"],
        "max_aspect_ratio": [0, 0.5, NAN, "x"],
        "max_bad_images": [-1, "x", 3],
    }
    yield from each("ItemReader", lambda **bad: ItemReader("images", **bad), **options)
    train = {
        **options,
        "num_negatives": [-1, "x"],
        "max_rows": [0, -1, "x"],
        "split": ["none", "../x", "*"],
        "subsets": [["None"], [], "Colours", 5],
        "check_images": ["maybe"],
    }
    yield from each(
        "load_mmeb_train",
        lambda **bad: load_mmeb_train(t.world / "train", image_root=t.world / "images", **bad),
        **train,
    )
    yield from paths("load_mmeb_train", load_mmeb_train, t)
    evaluation = {
        "task": ["None", "", "../train/Colours"],
        "split": ["none", "../x"],
        "max_pixels": [0],
        "image_size": [0],
    }
    yield from each(
        "load_mmeb_eval",
        lambda **bad: load_mmeb_eval(**{"root": t.world / "eval", "task": "MSCOCO_t2i", **bad}),
        **evaluation,
    )
    for bad in ("../x.png", "/etc/hostname", "C:\\x.png", "none.png", "a\0.png", "x" * 300, "", "."):
        yield Case(
            "resolve_image",
            repr(bad)[:60],
            partial(resolve_image, t.world / "images", bad),
            (repr(bad)[1:60].strip("'"),),
        )
    streams = [
        t.rows.to_iterable_dataset(),
        None,
        "rows",
        [{"anchor": "a"}],
        t.rows.with_transform(lambda batch: batch),
    ]
    yield from each(
        "with_images",
        lambda **bad: with_images(**{"dataset": t.rows, **bad}),
        image_columns=[["none"], ["a", "b"]],
        **options,
    )
    for bad in streams:
        yield Case("with_images", f"dataset={type(bad).__name__}", partial(with_images, bad), ("dataset", "data set"))
    damaged = t.root / "log.jsonl"
    damaged.write_bytes(b"\xff{]\n{}\n[]\n")
    yield Case("bad_image_report", "a damaged log", partial(bad_image_report, damaged), (), True)
    yield Case("bad_image_report", "no log", partial(bad_image_report, t.root / "none"), (), True)


def _data_files(t: Things) -> Iterator[Case]:

    texts = t.world / "texts.txt"
    yield from each(
        "load_nli",
        lambda **bad: load_nli(**{"source": texts, **bad}),
        max_rows=[0, -1, "x"],
        columns=[["none"], [], "text"],
        source=[t.root / "none.csv", t.root / "empty", None, 5],
    )
    for name, content in {
        "a.json": b"{",
        "a.jsonl": b"[1]\nx",
        "a.parquet": b"PAR1",
        "a.csv": b"",
        "b.txt": b"\xff\xfe\xff",
    }.items():
        (t.root / name).write_bytes(content)
        yield Case("load_nli", f"damaged {name}", partial(load_nli, t.root / name), (name,))
    columns = {"qry": ["q"], "qry_image_path": [""], "pos_text": ["p"], "pos_image_path": [""]}
    for number, bad in enumerate(
        ({**columns, "qry": [5]}, {"qry": ["q"]}, {name: [""] for name in columns}, {**columns, "neg_txt": ["x"]})
    ):
        folder = t.root / f"mmeb-{number}"
        (folder / "A").mkdir(parents=True)
        pq.write_table(pa.table(bad), folder / "A" / "original-0.parquet")
        yield Case(
            "load_mmeb_train", f"a table of {bad}"[:60], partial(load_mmeb_train, folder), ("original-0.parquet", "A:")
        )
        pq.write_table(
            pa.table({"qry_text": ["q"], "qry_img_path": [""], "tgt_text": [[]], "tgt_img_path": [["x"] * number]}),
            folder / "A" / "test-0.parquet",
        )
        yield Case(
            "load_mmeb_eval",
            f"no text, {number} images",
            partial(load_mmeb_eval, folder, "A"),
            ("row 0 of test-0.parquet",),
        )
    good = {"teacher": _Teacher(), "texts": ["a", "b"], "teacher_name": "t"}
    yield from each(
        "teacher_embeddings",
        lambda **bad: teacher_embeddings(**{**good, "cache_dir": t.new(), **bad}),
        texts=["abc", [], [None], [5], [NAN], 5],
        teacher=[None, 5],
        batch_size=[0, -1],
        shard_size=[0, -1],
        cache_dir=[t.file, None],
    )
    for bad in (np.full((1, 3), NAN), np.zeros((2, 3)), np.zeros(3), np.zeros((1, 0)), "x", None):
        yield Case(
            "with_teacher_labels",
            f"{bad!r:.40}",
            partial(with_teacher_labels, ["a"], bad),
            ("teacher", "row", "embedding", "label"),
        )


class _Teacher:
    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def _corpora(t: Things) -> Iterator[Case]:

    def corpus(**bad: Any) -> Any:
        return encode_corpus(
            **{"model": _Teacher(), "inputs": ["a", "bb"], "output_dir": t.new(), "model_name": "t", **bad}
        )

    yield from each(
        "encode_corpus",
        corpus,
        window_size=[0, -1, 1.5, "x"],
        output_format=["csv", None],
        dtype=["float8", "int8", None],
        cache_bytes=[-1, "x"],
        inputs=[None, 5, "ab"],
        output_dir=[None, 5, t.file],
        model=[None, 5],
    )
    for bad in ([None], [{"image": "none.png"}], [{"img": 1}], [object()], [NAN]):
        yield Case("encode_corpus", f"inputs={bad!r:.40}", partial(corpus, inputs=bad), ("row 0",))
    for bad in ([(True, "a")], [(1.5, "a")], ["a"], [(None, "a")], [(1, "a"), ("2", "b")]):
        yield Case("encode_corpus", f"ids of {bad}", partial(corpus, inputs=bad, with_ids=True), ("row", "id"))
    made = corpus()
    for bad in ([5], [-3], [0.5], ["x"], [None], [True]):
        yield Case("EncodedCorpus.rows", repr(bad), partial(made.rows, bad), ("row", repr(bad[0])))
    yield from paths("load_corpus", load_corpus, t)
    for name, content in {"manifest": b"{", "list": b"[]", "other": b"{}"}.items():
        folder = t.root / f"corpus-{name}"
        folder.mkdir()
        for file in made.folder.glob("*.json"):
            (folder / file.name).write_bytes(content)
        yield Case("load_corpus", f"manifest {content!r}", partial(load_corpus, folder), (folder.name,))
    yield from each(
        "encode_stream",
        lambda **bad: list(encode_stream(**{"model": _Teacher(), "inputs": ["a"], **bad})),
        window_size=[0, -1, "x"],
        cache_bytes=[-1],
        inputs=[None, [None]],
    )


def _mining(t: Things) -> Iterator[Case]:

    def mine(**bad: Any) -> Any:
        return mine_hard_negatives(
            **{"dataset": t.rows, "model": t.model(), "output_dir": t.new(), "num_negatives": 1, **bad}
        )

    yield from each(
        "mine_hard_negatives",
        mine,
        num_negatives=[0, -1, "x", 1.5],
        margin=[NAN, "x"],
        range_min=[-1, 10, "x"],
        range_max=[0, -1],
        sampling_strategy=["bottom", None],
        too_few=["ignore", None],
        search=["annoy"],
        batch_size=[0, -1],
        shard_size=[0, -1],
        rows_per_file=[0, -1],
        dataset=[None, Dataset.from_dict({"anchor": ["a"]}), t.rows.select([])],
        output_dir=[t.file],
    )
    none = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["x", None]})
    yield Case("mine_hard_negatives", "a positive that is None", partial(mine, dataset=none), ("row 1", "positive"))
    yield from paths("load_mined_negatives", load_mined_negatives, t)


def _evaluators(t: Things) -> Iterator[Case]:

    images, captions = [t.image, Image.new("RGB", (20, 20), "blue")], [["a"], ["b"]]
    yield from each(
        "ImageTextRetrievalEvaluator",
        lambda **bad: e.ImageTextRetrievalEvaluator(**{"images": images, "captions": captions, **bad})(t.model()),
        images=[[], [t.image]],
        captions=[[], [["a"], []], ["a", "b"], [[None], ["b"]], [[5], ["b"]], [["a"], None]],
        ks=[(), (0,), (-1,), ("x",)],
        chunk_size=[0, -1],
        batch_size=[0, -1, "x"],
    )
    row = (t.image, "a", "b")
    yield from each(
        "SugarCrepeEvaluator",
        lambda **bad: e.SugarCrepeEvaluator(**{"sets": {"s": [row]}, **bad})(t.model()),
        sets=[
            {},
            {"s": []},
            {"s": [row[:2]]},
            {"s": [(t.image, None, "b")]},
            {"s": [(None, "a", "b")]},
            [row],
            {"s": [(t.image, 5, "b")]},
        ],
        groups=[{"G": ["none"]}, {"G": []}],
        batch_size=[0],
    )
    yield from each(
        "MMEBEvaluator",
        lambda **bad: e.MMEBEvaluator(**{"root": t.world / "eval", "image_root": t.world / "images", **bad})(t.model()),
        tasks=[["None"], [], [5]],
        on_error=["ignore", None],
        limit=[0, -1, "x"],
        max_pixels=[0, -1],
        image_size=[0, (0, 1)],
        root=[t.root / "nowhere", t.root / "empty", t.file],
        batch_size=[0],
        image_root=[t.root / "nowhere"],
    )
    for text in (
        "[]",
        "a: 5",
        "a: {}",
        "a: {dataset_parser: none}",
        "{",
        "a: {dataset_parser: image_qa, image_root: ..}",
    ):
        path = t.root / f"tasks-{abs(hash(text))}.yaml"
        path.write_text(text)
        yield Case(
            "MMEBEvaluator.from_yaml", text, partial(e.MMEBEvaluator.from_yaml, path, t.world / "eval"), (path.name,)
        )
    for text in (
        "[]",
        "{",
        "5",
        json.dumps({"images": [5]}),
        json.dumps({"images": []}),
        json.dumps({"images": [{"filename": "x", "split": "test"}]}),
    ):
        path = t.root / f"karpathy-{abs(hash(text))}.json"
        path.write_text(text)
        make = e.ImageTextRetrievalEvaluator.from_karpathy_split
        yield Case("from_karpathy_split", text, partial(make, path, t.world / "images"), (path.name, "'x'"))
        folder = t.root / f"crepe-{abs(hash(text))}"
        folder.mkdir()
        (folder / "swap_att.json").write_text(text)
        yield Case(
            "SugarCrepeEvaluator.from_folder",
            text,
            partial(e.SugarCrepeEvaluator.from_folder, folder, t.world),
            ("swap_att",),
        )
    yield from each(
        "encode_distinct",
        lambda **bad: e.encode_distinct(**{"model": t.model(), "items": ["a"], **bad}),
        items=[[], [None], [{"image": "none.png"}], [5]],
        batch_size=[0, -1],
        prompt_name=["none"],
    )
    yield from each(
        "EmbeddingCache",
        lambda **bad: e.EmbeddingCache(**{"folder": t.new(), **bad}),
        max_bytes=[-1, "x", NAN],
        folder=[None, 5],
    )
    yield from each(
        "compare",
        lambda **bad: e.compare(**{"before": t.root / "empty", "after": t.root / "empty", **bad}),
        before=[t.root / "nowhere", t.file, None],
    )
