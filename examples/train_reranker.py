"""Train a yes/no reranker on judged negatives, as UniME-V2's: a right pair and a hard negative of each row.

python examples/train_reranker.py Qwen/Qwen2.5-VL-7B-Instruct judged --output reranker
accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_reranker.py ... --listwise

The defaults are the authors' for 8 GPUs. With `--listwise` the loss is theirs, L_pair + L_list: a batch holds rows
then, each of which is a right pair, a wrong pair and a list. Else it is the binary cross-entropy of single pairs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

from unime_st import build_reranker, export_reranker
from unime_st.checkpoints import CheckpointCallback, last_complete_checkpoint
from unime_st.columns import training_columns
from unime_st.data import load_judged_negatives
from unime_st.losses import PairAndListLoss
from unime_st.modules import default_lora_config


def labelled_pairs(judged: Dataset) -> Dataset:
    """A row for each pair: query, candidate, and 1.0 for the right one, 0.0 for a negative."""
    columns = training_columns(judged.column_names)
    stored, transform = judged.with_format(None), judged.format["format_kwargs"].get("transform")
    parts = []
    for place, name in enumerate([columns.positive, *columns.negatives]):
        there = [row for row, scores in enumerate(stored["label"]) if scores[place] >= 0]  # -1 is none
        part = stored.select(there).select_columns([columns.anchor, name])
        part = part.rename_columns({columns.anchor: "query", name: "candidate"})
        parts.append(part.add_column("label", [float(place == 0)] * len(part)))
    pairs = concatenate_datasets(parts)
    return pairs if transform is None else pairs.with_transform(transform)


def trained(model: CrossEncoder, rows: Dataset, given: argparse.Namespace) -> None:
    """Train, from the last whole checkpoint if there is one."""
    folder = given.output.with_name(given.output.name + "_training")
    settings = CrossEncoderTrainingArguments(
        str(folder),
        per_device_train_batch_size=given.batch_size,
        gradient_accumulation_steps=given.accumulate,
        num_train_epochs=given.epochs,
        max_steps=given.max_steps,
        learning_rate=given.learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=0.03,
        bf16=not given.cpu,
        gradient_checkpointing=given.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if given.gradient_checkpointing else None,
        use_cpu=given.cpu,
        logging_steps=10,
        save_steps=100,
        save_total_limit=2,
        report_to="none",
        seed=0,
    )
    loss = PairAndListLoss(model) if given.listwise else BinaryCrossEntropyLoss(model)
    trainer = CrossEncoderTrainer(model, settings, rows, loss=loss, callbacks=[CheckpointCallback()])
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="a multimodal LLM, with its head")
    parser.add_argument("judged", type=Path, help="folder of `examples/judge.py`, or of an imported released set")
    parser.add_argument("--output", type=Path, required=True, help="folder of the reranker")
    parser.add_argument("--prompt", default="unime_v2", help="of rerank_prompts.PAIR_PROMPTS (default: %(default)s)")
    parser.add_argument("--listwise", action="store_true", help="train for pairs and for lists of up to 5 candidates")
    parser.add_argument("--num-negatives", type=int, help="of a row (default: 1; with --listwise all, up to 4 a list)")
    parser.add_argument("--max-pixels", type=int, help="of an image; the authors have 300 * 28 * 28 = 235200")
    parser.add_argument("--rank", type=int, default=128, help="of LoRA, alpha twice that (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="pairs or rows a device (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=4, help="batches a step (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time; as published")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, in float32")
    given = parser.parse_args(arguments)

    # 1. Pairs, right and wrong, or whole rows; images are opened when they are drawn.
    number = 1 if given.num_negatives is None and not given.listwise else given.num_negatives
    rows = load_judged_negatives(given.judged, num_negatives=number)
    if not given.listwise:
        rows = labelled_pairs(rows)

    # 2. The reranker, with LoRA on its language model.
    model = build_reranker(
        given.backbone,
        prompt=given.prompt,
        max_pixels=given.max_pixels,
        max_seq_length=4096,
        peft_config=default_lora_config(given.rank, dropout=0.05),
        device="cpu" if given.cpu else None,
    )

    # 3. Train; then write a stock CrossEncoder, adapters merged.
    trained(model, rows, given)
    print(f"wrote {export_reranker(model, given.output)}")
    return given.output


if __name__ == "__main__":
    main()
