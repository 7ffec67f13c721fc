"""UniME-V2's training: the encoder learns a judge's scores of each query's own candidates.

python examples/judge.py MMEB-train encoder Qwen/Qwen2.5-VL-7B-Instruct --output judged  # first
python examples/train_soft_labels.py --recipe examples/recipes/soft_labels_qwen2_vl.yaml data.folder=judged
python examples/train_soft_labels.py --dry-run --processes 8 --recipe ...  # the plan only, without weights
accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_soft_labels.py --recipe ...
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dry_run import dry_run
from recipe import SoftLabelsRecipe, recipe_from_command_line
from stage import count_negatives, judged_rows, load_start, train, training_arguments

from unime_st.columns import training_columns
from unime_st.files import write_atomically
from unime_st.losses import CandidateKLLoss


def tell_of_judge(card: Path, folder: str) -> None:
    """Add to the encoder's card which judge chose its negatives, and by which thresholds."""
    told = json.loads((Path(folder) / "mined.json").read_text(encoding="utf-8"))
    known = told["settings"] if isinstance(told["settings"], dict) else json.loads(told["settings"])
    names = ("judge", "margin", "stride", "num_negatives", "too_few", "file")
    lines = [f"- {name}: {known[name]}" for name in names if name in known]
    counts = [f"- {name}: {told[name]}" for name in ("rows", "kept", "too_few", "without_negatives") if name in told]
    text = "\n".join(["", "## Negatives and their judge", "", *lines, "", "Rows:", "", *counts, ""])
    write_atomically(card, card.read_text(encoding="utf-8") + text)


def main(arguments: Sequence[str] | None = None) -> Path | None:
    recipe, options = recipe_from_command_line(SoftLabelsRecipe, __doc__, arguments)
    if options.dry_run:
        return dry_run(recipe, options.processes)
    training = training_arguments(recipe)

    # 1. Rows with their candidates' scores, whose images are opened in the data loader's workers.
    rows = judged_rows(**recipe.data)

    # 2. The encoder, with LoRA on its language model, and the loss.
    model = load_start(recipe, training)
    loss = CandidateKLLoss(model, **recipe.loss)
    count_negatives(loss, training, candidates_a_row=1 + len(training_columns(rows.column_names).negatives))

    # 3. Train, or go on; then write the encoder, and its judge into its card.
    encoder = train(recipe, training, rows, loss)
    if not training.process_index:
        tell_of_judge(encoder / "README.md", recipe.data["folder"])
    return encoder


if __name__ == "__main__":
    main()
