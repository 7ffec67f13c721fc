"""Stage 1 (UniME, 3.2): the language model learns a text teacher's similarities.

python examples/train_stage1.py --recipe examples/recipes/stage1_qwen2_vl.yaml training.max_steps=10
python examples/train_stage1.py --dry-run --processes 8 --recipe ...  # the plan only, without weights
accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_stage1.py --recipe ...
"""

from collections.abc import Sequence
from pathlib import Path

from dry_run import dry_run
from recipe import Stage1Recipe, recipe_from_command_line
from stage import count_negatives, load_start, teacher_labels, train, training_arguments

from unime_st.data import load_nli
from unime_st.losses import DistillKLLoss


def main(arguments: Sequence[str] | None = None) -> Path | None:
    recipe, options = recipe_from_command_line(Stage1Recipe, __doc__, arguments)
    if options.dry_run:
        return dry_run(recipe, options.processes)
    training = training_arguments(recipe)

    # 1. Texts, and the teacher's embeddings of them: computed once, by the first process, and kept on disk.
    texts = load_nli(**recipe.data)
    with training.main_process_first(desc="the teacher's embeddings"):
        rows = teacher_labels(texts, **recipe.teacher)

    # 2. The student, with LoRA on its language model, and the loss.
    model = load_start(recipe, training)
    loss = DistillKLLoss(model, **recipe.loss)
    count_negatives(loss, training, candidates_a_row=len(texts.column_names))

    # 3. Train, or go on; then write the encoder that stage 2 starts from.
    return train(recipe, training, rows, loss)


if __name__ == "__main__":
    main()
