"""Stage 2 (UniME, 3.3): instruction tuning on multimodal pairs with hard negatives.

python examples/train_stage2.py --recipe examples/recipes/stage2_qwen2_vl.yaml data.root=MMEB-train
python examples/train_stage2.py --dry-run --processes 8 --recipe ...  # the plan only, without weights
accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_stage2.py --recipe ...
"""

from collections.abc import Sequence
from pathlib import Path

from dry_run import dry_run
from recipe import Stage2Recipe, recipe_from_command_line
from stage import count_negatives, load_start, train, training_arguments

from unime_st.columns import training_columns
from unime_st.data import load_mmeb_train
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.samplers import FalseNegativeAwareBatchSampler


def main(arguments: Sequence[str] | None = None) -> Path | None:
    recipe, options = recipe_from_command_line(Stage2Recipe, __doc__, arguments)
    if options.dry_run:
        return dry_run(recipe, options.processes)

    # 1. No two rows of a global batch are false negatives of each other.
    sampler = FalseNegativeAwareBatchSampler.configured(**recipe.sampler)
    training = training_arguments(recipe, batch_sampler=sampler)

    # 2. Pairs whose images are opened in the data loader's workers.
    rows = load_mmeb_train(**recipe.data)

    # 3. The encoder, with LoRA on its language model, and the loss.
    model = load_start(recipe, training)
    loss = HardNegativeInfoNCELoss(model, **recipe.loss)
    count_negatives(loss, training, candidates_a_row=1 + len(training_columns(rows.column_names).negatives))

    # 4. Train, or go on; then write the encoder.
    return train(recipe, training, rows, loss)


if __name__ == "__main__":
    main()
