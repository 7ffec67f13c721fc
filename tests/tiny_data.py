"""Tiny data in the layouts that the loaders, evaluators and example scripts read, and a tiny text teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny import picture

COLOURS = ("red", "green", "white", "yellow", "purple", "black", "orange", "pink")


def tiny_teacher(folder: Path) -> Path:
    """A text teacher: an average of random vectors of words."""
    words = {word: number for number, word in enumerate(["<unk>", "a", "picture", "thing", *COLOURS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=12)], device="cpu").save_pretrained(
        str(folder)
    )
    return folder


def tiny_world(root: Path) -> Path:
    """Pictures of colours in each layout: texts.txt, train and eval (MMEB's), images, captions, sugarcrepe."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "texts.txt").write_text(
        "".join(f"a {colour} {kind}\n" for colour in COLOURS for kind in ("picture", "thing"))
    )
    for folder in ("images", "captions", "sugarcrepe", "train/Colours", "eval/MSCOCO_t2i"):
        (root / folder).mkdir(parents=True)
    captions, pairs = [], {}
    for number, colour in enumerate(COLOURS):
        for folder in ("images", "captions"):
            picture(colour).save(root / folder / f"{colour}.png")
        captions.append({"file_name": f"{colour}.png", "text": [f"a {colour} picture", f"{colour} and blue"]})
        row = {"filename": f"{colour}.png", "caption": f"{colour} first", "negative_caption": f"{colour} last"}
        pairs[str(number)] = row
    (root / "captions" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    (root / "sugarcrepe" / "swap_att.json").write_text(json.dumps(pairs))
    train = [
        {
            "qry": f"Find a {colour} picture.",
            "qry_image_path": "",
            "pos_text": "<|image_1|>\n",
            "pos_image_path": f"{colour}.png",
        }
        for colour in COLOURS
    ]
    pq.write_table(pa.Table.from_pylist(train), root / "train/Colours/original-00000-of-00001.parquet")
    tasks = [
        {
            "qry_text": f"Find a {colour} picture.",
            "qry_img_path": "",
            "tgt_text": ["<|image_1|>"] * len(COLOURS),
            "tgt_img_path": [f"{other}.png" for other in (*COLOURS[place:], *COLOURS[:place])],
        }
        for place, colour in enumerate(COLOURS)
    ]
    pq.write_table(pa.Table.from_pylist(tasks), root / "eval/MSCOCO_t2i/test-00000-of-00001.parquet")
    return root
