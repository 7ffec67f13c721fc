"""The record of settings beside the results of an evaluation."""

import json
import platform
from importlib import metadata

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation_fakes import HashModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tiny import picture
from unime_st import build_encoder
from unime_st.evaluation import ImageTextRetrievalEvaluator, compare, model_fingerprint, read_settings
from unime_st.evaluation.settings import weights_of
from unime_st.videos import VideoSettings

IMAGES = [picture("red"), picture("green"), picture("black")]
TEXTS = ["red", "green", "black"]


class Judge:
    """Scores by the number of characters."""

    def predict(self, pairs, **_):
        return np.array([float(len(str(pair))) for pair in pairs])


def rows(folder, kind="results"):
    return folder / f"own_{kind}_rows.parquet"


def evaluator(**arguments):
    return ImageTextRetrievalEvaluator(IMAGES, [[text] for text in TEXTS], name="own", **arguments)


@pytest.fixture(scope="module")
def encoder(backbone):
    return build_encoder(
        backbone("qwen2_vl"), device="cpu", prompts={"find": "Find it: "}, videos=VideoSettings(num_frames=4)
    )


def test_all_that_decides_the_numbers_is_kept(encoder, tmp_path):
    metrics = evaluator(prompt_name="find", batch_size=2, reranker=Judge(), rerank_depth=3)(encoder, str(tmp_path))
    told = read_settings(rows(tmp_path))
    assert told["evaluator"] == "ImageTextRetrievalEvaluator"
    assert (told["prompt"], told["prompt_name"], told["batch_size"]) == ("Find it: ", "find", 2)
    assert (told["reranker"], told["reranker_weights"], told["rerank_depth"]) == ("Judge", "Judge", 3)
    assert told["weights"] == model_fingerprint(encoder)
    assert told["processor_size"]["longest_edge"] == encoder[0].processor.image_processor.size["longest_edge"]
    assert told["videos"] == {"num_frames": 4, "fps": None, "max_pixels": None, "as_images": False}
    assert told["versions"]["python"] == platform.python_version()
    for package in ("unime_st", "torch", "transformers", "sentence-transformers"):
        assert told["versions"][package] == metadata.version(package)
    assert read_settings(rows(tmp_path, "reranked_results")) == told
    assert json.loads((tmp_path / "own_results.json").read_text()) == metrics


def test_what_was_changed_between_two_evaluations_is_told(encoder, backbone, tmp_path):
    evaluator()(encoder, str(tmp_path / "a"))
    evaluator(prompt="Find it: ")(encoder, str(tmp_path / "prompt"))
    found = compare(tmp_path / "a", tmp_path / "prompt", resamples=10).other_settings
    assert found == {"own: prompt": ("-", '"Find it: "')}
    other = build_encoder(backbone("qwen2_vl"), device="cpu", max_pixels=28 * 28)
    evaluator()(other, str(tmp_path / "pixels"))
    found = compare(tmp_path / "a", tmp_path / "pixels", resamples=10).other_settings
    assert found["own: processor_size longest_edge"] == ("3136", "784")
    assert found["own: videos num_frames"] == ("4", "64")
    evaluator(reranker=Judge(), rerank_depth=2)(encoder, str(tmp_path / "reranked"))
    found = compare(rows(tmp_path / "a"), rows(tmp_path / "reranked"), resamples=10).other_settings
    assert found["own: rerank_depth"] == ("-", "2")


class Client:
    """Encodes elsewhere, so that its weights are not here."""

    def encode(self, items, **options):
        return HashModel().encode(items, **options)


def test_a_model_without_weights_is_named(tmp_path):
    evaluator()(Client(), str(tmp_path))
    assert read_settings(rows(tmp_path))["weights"] == "Client"


def test_weights_that_are_split_over_processes_are_said_not_to_be_told(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = torch.nn.Linear(2, 2)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert weights_of(model) == "not told: split over processes"
    finally:
        dist.destroy_process_group()
