"""What was stopped and goes on gives the bytes of what was never stopped, with features of images kept in memory."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import TrainerCallback

from tiny import FAMILIES, PLUGIN_FAMILIES, picture
from unime_st import build_encoder
from unime_st.checkpoints import CheckpointCallback, last_complete_checkpoint
from unime_st.data import encode_corpus, load_corpus, load_mmeb_train
from unime_st.losses import HardNegativeInfoNCELoss
from unime_st.samplers import FalseNegativeAwareBatchSampler, SamplerEpochCallback


class Stopped(Exception):
    pass


def until(inputs, count):
    yield from inputs[:count]
    raise Stopped


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        picture((number * 20, 255 - number * 20, number * 7), (30 + number % 5 * 9, 28 + number % 3 * 9)).save(
            folder / f"{number}.png"
        )
    return folder


@pytest.mark.parametrize("family", FAMILIES + PLUGIN_FAMILIES)
def test_a_resumed_corpus_has_the_same_bytes(family, backbone, images, tmp_path):
    inputs = [{"image": str(images / f"{row * 5 % 12}.png"), "text": f"question {row}"} for row in range(48)]
    options = {"window_size": 8, "batch_size": 4, "model_name": "m", "output_format": "npy"}
    model = build_encoder(backbone(family), device="cpu")
    wanted = np.concatenate(list(encode_corpus(model, inputs, tmp_path / "whole", **options).parts()))
    assert model[0].vision_cache.hits + model[0].vision_cache.misses > 0  # there was something to keep
    for stop in (12, 20, 41):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(Stopped):
            encode_corpus(build_encoder(backbone(family), device="cpu"), until(inputs, stop), folder, **options)
        encode_corpus(build_encoder(backbone(family), device="cpu"), inputs, folder, **options)
        found = np.concatenate(list(load_corpus(folder).parts()))
        assert found.tobytes() == wanted.tobytes()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == self.step:
            raise Stopped


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "fast_vlm", "smolvlm"])
def test_resumed_training_ends_with_the_same_weights(family, backbone, images, tmp_path):
    rows = [
        {"qry": f"Find picture {row}.", "qry_image_path": "", "pos_text": "", "pos_image_path": f"{row}.png"}
        for row in range(12)
    ]
    (tmp_path / "train" / "A").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train" / "A" / "original-0.parquet")
    dataset = load_mmeb_train(tmp_path / "train", image_root=images)
    folder = backbone(family)

    def train(output, *callbacks):
        torch.manual_seed(0)
        model = build_encoder(folder, device="cpu", peft_config=True)
        before = torch.cat([value.float().flatten() for value in model.state_dict().values()])
        arguments = SentenceTransformerTrainingArguments(
            str(output),
            per_device_train_batch_size=4,
            max_steps=9,
            save_steps=2,
            logging_steps=2,
            learning_rate=1e-3,
            report_to=[],
            seed=3,
            disable_tqdm=True,
            use_cpu=True,
            batch_sampler=FalseNegativeAwareBatchSampler,
        )
        loss = HardNegativeInfoNCELoss(model, mini_batch_size=2, num_hard_negatives=None)
        callbacks = [CheckpointCallback(), SamplerEpochCallback(), *callbacks]
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss, callbacks=callbacks)
        last = last_complete_checkpoint(output)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        after = torch.cat([value.float().flatten() for value in model.state_dict().values()])
        assert (after - before).abs().max() > 1e-3
        return after

    wanted = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", StopAt(5))
    assert torch.equal(train(tmp_path / "stopped"), wanted)
