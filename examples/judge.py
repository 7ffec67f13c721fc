"""UniME-V2's data: mine the nearest candidates of each query, judge them, keep good negatives with their scores.

python examples/judge.py MMEB-train encoder Qwen/Qwen2.5-VL-7B-Instruct --output judged
torchrun --nproc-per-node 8 examples/judge.py MMEB-train encoder reranker --output judged  # shared by processes

The same command goes on after a stop. `--json` also writes the layout of the released sets.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from unime_st import build_reranker, load_encoder, load_reranker
from unime_st.data import (
    judge_negatives,
    judged_json_rows,
    load_mined_negatives,
    load_mmeb_train,
    mine_hard_negatives,
    write_judged_json,
)
from unime_st.evaluation import model_fingerprint


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder in MMEB-train's layout")
    parser.add_argument("encoder", help="a saved encoder, which finds the candidates")
    parser.add_argument("judge", help="a multimodal LLM, or the folder of a saved CrossEncoder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result; the pool is beside it")
    parser.add_argument("--images", type=Path, help="folder of the images; that of the data by default")
    parser.add_argument("--subsets", nargs="+", help="of the data; all by default")
    parser.add_argument("--max-rows", type=int, help="of each subset")
    parser.add_argument("--pool", type=int, default=50, help="nearest candidates judged (default: %(default)s)")
    parser.add_argument("--num-negatives", type=int, default=10, help="kept of a row (default: %(default)s)")
    parser.add_argument("--margin", type=float, default=0.01, help="below the positive's score (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=5, help="every how many-th is taken (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write a JSON list as UniME-V2's authors release theirs")
    given = parser.parse_args(arguments)

    # 1. The nearest candidates of each query, by an encoder.
    rows = load_mmeb_train(given.data, given.subsets, image_root=given.images, max_rows=given.max_rows, num_negatives=0)
    encoder = load_encoder(given.encoder)
    pool = mine_hard_negatives(
        rows, encoder, given.output.with_name(given.output.name + "_pool"), num_negatives=given.pool, margin=None
    )
    del encoder  # its memory is the judge's now

    # 2. The judge's scores, and the choice by them. Its name and weights are told in the result and in model cards.
    is_saved = (Path(given.judge) / "modules.json").is_file()
    judge = (load_reranker if is_saved else build_reranker)(given.judge)
    judge_negatives(
        load_mined_negatives(pool),
        judge,
        given.output,
        num_negatives=given.num_negatives,
        margin=given.margin,
        stride=given.stride,
        judge_name=f"{Path(given.judge).name} ({model_fingerprint(judge)[:16]})",
        batch_size=given.batch_size,
    )
    if given.json:
        print(f"wrote {write_judged_json(judged_json_rows(given.output), given.json)}")
    print(f"wrote {given.output}")
    return given.output


if __name__ == "__main__":
    main()
