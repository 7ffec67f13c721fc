"""Two gloo processes compute what one computes: loss, gradients, metrics, for both losses, plain and cached."""

import logging
import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from two_processes import WORLD, run_two
from unime_st import distributed
from unime_st.losses import DistillKLLoss, HardNegativeInfoNCELoss, LossMetricsCallback

LOCAL, DIM = 6, 5
ROWS = WORLD * LOCAL
TOLERANCE = 1e-9


class TinyModel(nn.Module):
    """The least that the losses need: features in, sentence embedding out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, DIM)).double()

    def __getitem__(self, index):
        return self.layers[index]

    def forward(self, features):
        return {**features, "sentence_embedding": self.layers(features["input_ids"])}


def batch(seed=0, columns=3):
    """Features of a global batch with repeated contents, labels, and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    contents = torch.randint(0, 14, (columns, ROWS), generator=generator)
    table = torch.randn(14, 4, dtype=torch.float64, generator=generator)
    features = [{"input_ids": table[ids], "content_id": ids} for ids in contents]
    labels = torch.randint(0, 8, (ROWS,), generator=generator)
    teacher = torch.randn(ROWS, columns, 7, dtype=torch.float64, generator=generator)
    return features, labels, teacher


LOSSES = {
    "contrast": lambda model, **kw: HardNegativeInfoNCELoss(model, temperature=0.1, num_hard_negatives=4, **kw),
    "contrast_all": lambda model, **kw: HardNegativeInfoNCELoss(
        model, temperature=0.1, num_hard_negatives=None, margin=None, **kw
    ),
    "contrast_random": lambda model, **kw: HardNegativeInfoNCELoss(
        model, temperature=0.1, num_hard_negatives=4, negative_selection="random", **kw
    ),
    "contrast_trusting": lambda model, **kw: HardNegativeInfoNCELoss(
        model, temperature=0.1, num_hard_negatives=4, margin=-0.1, filter_explicit_negatives=False, **kw
    ),
    "contrast_weighted": lambda model, **kw: HardNegativeInfoNCELoss(
        model,
        temperature=0.1,
        num_hard_negatives=4,
        directions=("query_to_doc", "doc_to_query"),
        hardness_mode="in_batch_negatives",
        hardness_strength=9.0,
        **kw,
    ),
    "distill": lambda model, **kw: DistillKLLoss(model, temperature=0.3, **kw),
    "distill_no_diagonal": lambda model, **kw: DistillKLLoss(
        model, temperature=0.3, include_diagonal=False, direction="symmetric", **kw
    ),
}
MODES = {"plain": {}, "cached": {"mini_batch_size": 4}}


def step(name, mode, rows, wrap):
    """One training step on some rows of the global batch: loss, gradients, metrics."""
    torch.manual_seed(11)
    model = wrap(TinyModel())
    loss = LOSSES[name](model, gather_across_devices=True, **MODES[mode])
    features, labels, teacher = batch()
    local = [{key: value[rows] for key, value in column.items()} for column in features]
    value = loss(local, teacher[rows] if name.startswith("distill") else labels[rows])
    value.backward()
    gradients = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}
    return value.detach(), gradients, loss.pop_mean_metrics()


def published_gather_gradient(queries, targets):
    """The published distributed loss: everything gathered, the local part not put back. None: no gradient at all."""
    everything = [distributed.gather(part) for part in (queries, targets)]
    scores = everything[0] @ everything[1].T
    loss = nn.functional.cross_entropy(scores, torch.arange(len(scores)))
    return torch.autograd.grad(loss, queries) if loss.requires_grad else None


def gathers():
    """Everything test_gathering wants to know of one process."""
    own = torch.full((2, 3), float(distributed.rank()), requires_grad=True)
    first, second = distributed.gather_columns([own, own + 10])
    ((first.sum() + 2 * second[0].sum()) * (distributed.rank() + 1)).backward()
    queries, targets = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    torch.manual_seed(100 + distributed.rank())
    return {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "first": first.detach(),
        "second": second.detach(),
        "gradient": own.grad,
        "ids": distributed.gather(torch.tensor([distributed.rank(), 7])),
        "seed": distributed.shared_seed(torch.device("cpu")),
        "mean": distributed.mean_over_processes(torch.tensor([1.0, 4.0 * distributed.rank()])),
        "published": published_gather_gradient(queries, targets),
    }


def unequal_processes(rank):
    """What only one process knows: contents of its rows, and a loss that only it has met."""
    torch.manual_seed(5 + rank)
    columns = [torch.randn(LOCAL, DIM, dtype=torch.float64) for _ in range(2)]
    ids = [torch.arange(LOCAL), torch.zeros(LOCAL).long()]  # one and the same target
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=LOCAL, margin=None, gather_across_devices=True)
    other = DistillKLLoss(None, temperature=0.3)
    loss.compute_loss_from_embeddings(columns, None, ids if rank else None)
    by_identity = float(loss.last_metrics["false_negatives_by_identity"])
    if rank:
        other.compute_loss_from_embeddings(columns[:1], columns[1])
    own = {name: float(value) for name, value in other.last_metrics.items()}
    logs = {"loss": 1.0}
    callback = LossMetricsCallback({"contrast": loss, "distill": other, "unused": DistillKLLoss(None, temperature=1)})
    callback.on_log(SimpleNamespace(device="cpu"), SimpleNamespace(log_history=[]), None, logs=logs)
    return {"by_identity": by_identity, "own": own, "logs": logs}


def job(rank):
    rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
    results = {(name, mode): step(name, mode, rows, DistributedDataParallel) for name in LOSSES for mode in MODES}
    return results | {"gathers": gathers(), "unequal": unequal_processes(rank)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run_two(job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_equal_one(two_processes, name, mode):
    loss, gradients, metrics = step(name, "plain", slice(None), lambda model: model)
    ranks = [result[name, mode] for result in two_processes]
    assert loss.item() > 0.01
    assert torch.stack([rank[0] for rank in ranks]).mean().item() == pytest.approx(loss.item(), abs=TOLERANCE)
    assert ranks[0][0] != ranks[1][0]
    for parameter, gradient in gradients.items():
        assert gradient.abs().max() > 1e-4
        for rank in ranks:  # averaged by DistributedDataParallel, so equal on both
            torch.testing.assert_close(rank[1][parameter], gradient, rtol=0, atol=TOLERANCE)
    for metric in metrics.keys() - {"rows_without_negatives", "hard_negative_similarity"}:
        mean = sum(float(rank[2][metric]) for rank in ranks) / WORLD
        assert mean == pytest.approx(float(metrics[metric]), abs=1e-6), metric
    if "rows_without_negatives" in metrics:
        assert sum(float(rank[2]["rows_without_negatives"]) for rank in ranks) == float(
            metrics["rows_without_negatives"]
        )


def test_gathering(two_processes):
    first, second = (result["gathers"] for result in two_processes)
    assert (first["rank"], second["rank"], first["world_size"]) == (0, 1, 2)
    for result in (first, second):
        assert result["first"][:, 0].tolist() == [0, 0, 1, 1]
        assert result["second"][:, 0].tolist() == [10, 10, 11, 11]
        assert result["ids"].tolist() == [0, 7, 1, 7]
        assert result["mean"].tolist() == [1.0, 2.0]
    # Both processes used every part once (weights 1 and 2) and row 0 of the second column twice as much again.
    assert first["gradient"][:, 0].tolist() == [3 + 6, 3]
    assert second["gradient"][:, 0].tolist() == [3, 3]
    assert first["seed"] == second["seed"]


def test_what_one_process_does_not_know_stops_nobody(two_processes):
    """Both processes join the same collective calls, whatever each has to say."""
    first, second = (result["unequal"] for result in two_processes)
    assert (first["by_identity"], second["by_identity"]) == (0, LOCAL - 1)
    assert first["logs"] == second["logs"]
    assert first["logs"]["contrast_false_negatives_by_identity"] == (LOCAL - 1) / 2
    assert first["own"] == {}
    for name, value in second["own"].items():
        assert first["logs"][f"distill_{name}"] == pytest.approx(value, abs=1e-5)
    assert not [name for name in first["logs"] if name.startswith("unused")]


def test_defect_1_the_published_gather_has_no_gradient(two_processes):
    """And ours has: test_two_processes_equal_one compares it with one process."""
    assert [result["gathers"]["published"] for result in two_processes] == [None, None]


def test_one_process_does_nothing():
    columns = [torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)]
    assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (0, 1, False)
    assert all(a is b for a, b in zip(distributed.gather_columns(columns), columns, strict=True))
    assert torch.equal(distributed.gather(columns[0]), columns[0])
    assert not distributed.gather(columns[0]).requires_grad
    assert distributed.mean_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_columns_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape.*\(2, 3\), \(3, 3\)"):
        distributed.gather_columns([torch.ones(2, 3), torch.ones(3, 3)])


def late_and_dead(rank, folder):
    """Rank 1 comes late, and later not at all."""
    distributed._SAY_EVERY = 0.2
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("unime_st.distributed").addHandler(handler)
    time.sleep(1.0 * rank)
    gathered = distributed.gather_objects(rank)
    time.sleep(1.0 * (1 - rank))
    handed = distributed.from_rank_zero(lambda: "made")
    said, failures = list(records), []
    if rank == 1:
        torch.save({"said": said}, f"{folder}/1.pt")
        os._exit(0)
    for call in (lambda: distributed.gather_objects(rank), lambda: distributed.from_rank_zero(lambda: None)):
        try:
            call()
        except RuntimeError as error:
            failures.append(str(error))
    torch.save({"said": said, "failures": failures, "gathered": gathered, "handed": handed}, f"{folder}/0.pt")
    os._exit(0)  # the group cannot be ended without the other


def test_one_that_waits_says_so_and_a_dead_one_is_told_of(tmp_path):
    first, second = run_two(late_and_dead, tmp_path, str(tmp_path))
    assert (first["gathered"], first["handed"]) == ([0, 1], "made")
    assert len(first["said"]) >= 2
    assert "Rank 0 of 2 has waited to exchange results since" in first["said"][0]
    assert "`ddp_timeout`" in first["said"][0]
    assert any("Rank 1 of 2 has waited for what rank 0 computes" in line for line in second["said"])
    assert first["failures"]
    for failure in first["failures"]:
        assert "another process has died or did not come in time" in failure
        assert "start again" in failure
