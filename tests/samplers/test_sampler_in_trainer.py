"""The sampler inside the real Trainer, stopped in the middle of an epoch and resumed."""

import pytest
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from unime_st.samplers import FalseNegativeAwareBatchSampler, SamplerEpochCallback


def shout(batch):
    """A lazy transform, as the image loaders use."""
    return {
        name: [value.upper() if isinstance(value, str) else value for value in values] for name, values in batch.items()
    }


class Recorder:
    """A collator that remembers its batches."""

    def __init__(self, collator, collated):
        self.collator, self.seen, self.collated = collator, [], collated
        self.valid_label_columns = collator.valid_label_columns

    def __call__(self, features):
        self.seen.append([(row["anchor"], row["positive"]) for row in features])
        batch = self.collator(features)
        self.collated.append(sorted(batch))
        return batch


@pytest.fixture
def dataset():
    rows = {"anchor": [f"q{i}" for i in range(22)], "positive": [f"t{i % 9}" for i in range(22)]}
    return Dataset.from_dict(rows).with_transform(shout)


def train(dataset, folder, max_steps=-1, resume=False, options=None, collated=None):
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "Q1": 1, "T1": 2, "Q2": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    args = SentenceTransformerTrainingArguments(
        folder, per_device_train_batch_size=4, num_train_epochs=3, max_steps=max_steps, save_steps=7, report_to="none",
        batch_sampler=FalseNegativeAwareBatchSampler.configured(world_size=1, **(options or {})),
        dataloader_drop_last=True, seed=1,
        disable_tqdm=True, logging_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=dataset, loss=MultipleNegativesRankingLoss(model), callbacks=[SamplerEpochCallback()]
    )
    trainer.data_collator = recorder = Recorder(trainer.data_collator, [] if collated is None else collated)
    trainer.train(resume_from_checkpoint=resume)
    return recorder.seen


def test_training_resumes_with_the_batches_that_were_left(dataset, tmp_path):
    whole = train(dataset, str(tmp_path / "whole"))
    assert len(whole) == 15
    assert all(len({target for _, target in batch}) == len(batch) == 4 for batch in whole)
    for epoch in range(3):
        queries = [query for batch in whole[5 * epoch : 5 * epoch + 5] for query, _ in batch]
        assert len(set(queries)) == 20
    assert whole[:5] != whole[5:10]
    folder = str(tmp_path / "whole")
    resumed = train(dataset, folder, resume=f"{folder}/checkpoint-7")  # two batches into the second epoch
    assert resumed == whole[7:]
