import logging
import math
import re

import numpy as np
import pytest
import torch
from helpers import ANCHORS, NEGATIVES, POSITIVES, assert_same_step, features, run
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils._python_dispatch import TorchDispatchMode

from unime_st.functional import cosine_scores, hardest_valid_negatives, info_nce
from unime_st.losses import HardNegativeInfoNCELoss

TRIPLET = (ANCHORS, POSITIVES, NEGATIVES)
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2])
BOTH = ("query_to_doc", "doc_to_query")
WEIGHTED = {"directions": BOTH, "hardness_mode": "all_negatives", "hardness_strength": 9.0}


def random_embeddings(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- equivalences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"mini_batch_size": 1}, {"mini_batch_size": 3}, {"mini_batch_num_tokens": 16}])
@pytest.mark.parametrize("contrast", [{"num_hard_negatives": 2}, {}, {"num_hard_negatives": 3, **WEIGHTED}], ids=str)
def test_cached_equals_plain(text_model, options, contrast):
    arguments = {"temperature": 0.1, **contrast}
    plain = run(HardNegativeInfoNCELoss(text_model, **arguments), text_model, TRIPLET, LABELS)
    cached = run(HardNegativeInfoNCELoss(text_model, **arguments, **options), text_model, TRIPLET, LABELS)
    assert_same_step(plain, cached)


def test_cached_equals_plain_for_random_negatives(text_model):
    steps = []
    for options in ({}, {"mini_batch_size": 3}):
        torch.manual_seed(3)
        loss = HardNegativeInfoNCELoss(text_model, num_hard_negatives=3, negative_selection="random", **options)
        steps.append(run(loss, text_model, TRIPLET))
    assert_same_step(*steps)


def test_cached_replays_dropout(text_model_with_dropout):
    """With one mini-batch a column, the draws of plain and cached agree, so gradients must."""
    steps = []
    for options in ({}, {"mini_batch_size": 8}):
        torch.manual_seed(3)
        loss = HardNegativeInfoNCELoss(text_model_with_dropout, num_hard_negatives=3, **options)
        steps.append(run(loss, text_model_with_dropout.train(), TRIPLET))
    assert_same_step(*steps)


@pytest.mark.parametrize("columns", [(ANCHORS, POSITIVES), TRIPLET], ids=["pairs", "triplets"])
@pytest.mark.parametrize("cached", [False, True])
def test_unfiltered_equals_the_stock_ranking_loss(text_model, columns, cached):
    options = {"mini_batch_size": 3} if cached else {}
    stock = (CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss)(
        text_model, scale=20.0, **options
    )
    ours = HardNegativeInfoNCELoss(text_model, temperature=0.05, margin=None, num_hard_negatives=None, **options)
    assert_same_step(run(stock, text_model, columns), run(ours, text_model, columns))


@pytest.mark.parametrize("columns", [(ANCHORS, POSITIVES), TRIPLET], ids=["pairs", "triplets"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("stock_options", "options"),
    [
        ({"directions": BOTH, "partition_mode": "per_direction"}, {"directions": BOTH}),
        *(
            [{"hardness_mode": mode, "hardness_strength": strength}] * 2
            for mode, strength in (("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 9.0))
        ),
    ],
    ids=str,
)
def test_directions_and_hardness_are_the_stock_ranking_losss(text_model, columns, cached, stock_options, options):
    cache = {"mini_batch_size": 3} if cached else {}
    kind = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
    stock = kind(text_model, scale=20.0, **stock_options, **cache)
    ours = HardNegativeInfoNCELoss(text_model, temperature=0.05, margin=None, **options, **cache)
    assert_same_step(run(stock, text_model, columns), run(ours, text_model, columns))


@pytest.mark.parametrize("contrast", [{}, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_equals_the_sum_over_dimensions(text_model, cached, contrast):
    options = {"mini_batch_size": 3} if cached else {}
    wrapped = MatryoshkaLoss(
        text_model,
        HardNegativeInfoNCELoss(text_model, num_hard_negatives=3, **contrast, **options),
        [16, 8],
        [1.0, 0.5],
    )

    class Sum(torch.nn.Module):
        def forward(self, columns, labels=None):
            embeddings = [text_model(column)["sentence_embedding"] for column in columns]
            inner = HardNegativeInfoNCELoss(None, num_hard_negatives=3, **contrast)
            return inner.compute_loss_from_embeddings(embeddings) + 0.5 * inner.compute_loss_from_embeddings(
                [embedding[:, :8] for embedding in embeddings]
            )

    assert_same_step(run(Sum(), text_model, TRIPLET), run(wrapped, text_model, TRIPLET))


def test_rows_in_any_order_give_the_same_loss(text_model):
    loss = HardNegativeInfoNCELoss(text_model, num_hard_negatives=3)
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    shuffled = tuple([column[i] for i in order] for column in TRIPLET)
    assert_same_step(run(loss, text_model, TRIPLET), run(loss, text_model, shuffled))


def test_bfloat16_autocast_does_not_reach_the_scores():
    embeddings = [random_embeddings(16, 32, seed=s) for s in range(2)]
    loss = HardNegativeInfoNCELoss(None)
    exact = loss.compute_loss_from_embeddings(embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss.compute_loss_from_embeddings(embeddings), exact, rtol=0, atol=0)


# --- closed forms and edge rows ---------------------------------------------------------------------------------------


def test_zero_embeddings_give_log_of_the_number_of_choices():
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=5)
    zeros = [torch.zeros(8, 4) for _ in range(2)]
    assert loss.compute_loss_from_embeddings(zeros).item() == pytest.approx(math.log(1 + 5))
    keep_all = HardNegativeInfoNCELoss(None, num_hard_negatives=None)
    assert keep_all.compute_loss_from_embeddings(zeros).item() == pytest.approx(math.log(8))


def test_row_with_nothing_to_contrast_is_finite_and_counted():
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=3)
    columns = [random_embeddings(4, 8, seed=s).requires_grad_() for s in range(2)]
    value = loss.compute_loss_from_embeddings(columns, labels=torch.tensor([7, 7, 7, 7]))
    value.backward()
    assert value.item() == 0
    assert all(torch.count_nonzero(column.grad) == 0 for column in columns)
    assert float(loss.last_metrics["rows_without_negatives"]) == 4
    assert float(loss.last_metrics["false_negatives_by_identity"]) == 3


def test_one_row_alone_is_finite():
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=None)
    assert loss.compute_loss_from_embeddings([torch.ones(1, 3), torch.ones(1, 3)]).item() == 0
    assert float(loss.last_metrics["rows_without_negatives"]) == 1


def test_repeated_candidates_count_once():
    """Row 0 has k = 2 places; the negative that appears three times must leave one for the other."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    popular, other = torch.tensor([0.6, 0.8]), torch.tensor([0.5, 0.866])
    positives = torch.stack([torch.tensor([1.0, 0.0]), popular, popular, popular, other])
    ids = [torch.arange(100, 105), torch.tensor([0, 1, 1, 1, 2])]
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=2, margin=None, temperature=1.0)
    column = positives.requires_grad_()
    loss.compute_loss_from_embeddings([queries[:1].expand(5, 2), column], content_ids=ids).backward()
    assert column.grad[4].abs().sum() > 0


def test_same_query_content_is_a_false_negative():
    columns = [random_embeddings(3, 8), random_embeddings(3, 8, seed=1)]
    loss = HardNegativeInfoNCELoss(None, margin=None, num_hard_negatives=2)
    loss.compute_loss_from_embeddings(columns, content_ids=[torch.tensor([5, 5, 6]), torch.tensor([1, 2, 3])])
    assert float(loss.last_metrics["false_negatives_by_identity"]) == pytest.approx(2 / 3)


def test_label_reaches_an_explicit_negative_of_equal_content():
    """Rows 0 and 1 share a label, and row 2's explicit negative repeats row 1's positive: wrong for row 0 too."""
    ids = [torch.tensor([10, 11, 12]), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 2])]
    columns = [random_embeddings(3, 8, seed=s).requires_grad_() for s in range(3)]
    loss = HardNegativeInfoNCELoss(None, margin=None, num_hard_negatives=None)
    loss.compute_loss_from_embeddings(columns, torch.tensor([0, 0, 1]), ids)
    # Rows 0 and 1: the other's positive and its copy; row 2: nothing.
    assert float(loss.last_metrics["false_negatives_by_identity"]) == pytest.approx(4 / 3)


def test_trusted_explicit_negatives_pass_the_margin_but_not_identity():
    query, positive, close = torch.eye(3)[:1], torch.tensor([[0.3, 0.9, 0.0]]), torch.tensor([[0.9, 0.1, 0.0]])
    columns = [query.expand(3, 3), torch.cat([positive, close, torch.eye(3)[2:]]), close.expand(3, 3).contiguous()]
    queries, negatives = torch.tensor([10, 11, 12]), torch.tensor([2, 7, 8])  # row 1's positive is row 0's negative

    def filtered(trust):
        loss = HardNegativeInfoNCELoss(None, num_hard_negatives=None, filter_explicit_negatives=not trust)
        loss.compute_loss_from_embeddings(columns, content_ids=[queries, torch.tensor([1, 2, 3]), negatives])
        return [round(3 * float(loss.last_metrics[f"false_negatives_by_{kind}"])) for kind in ("margin", "identity")]

    # By margin, row 0 loses 4 candidates and row 2 all 5. Trusted: row 0 keeps its own and its equal, row 2 its own.
    assert filtered(trust=False) == [9, 1]
    assert filtered(trust=True) == [6, 1]


def test_random_negatives_are_valid_vary_and_follow_the_seed():
    queries, positives = random_embeddings(32, 8), random_embeddings(32, 8, seed=1)
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=4, negative_selection="random")

    def draw(seed):
        torch.manual_seed(seed)
        value = loss.compute_loss_from_embeddings([queries, positives])
        return value.item(), float(loss.last_metrics["hard_negative_similarity"])

    hardest = HardNegativeInfoNCELoss(None, num_hard_negatives=4)
    hardest.compute_loss_from_embeddings([queries, positives])
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[1] < float(hardest.last_metrics["hard_negative_similarity"]) - 0.1
    # Every valid candidate is drawn about as often as another.
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=1, negative_selection="random", margin=None)
    counts = torch.zeros(8)
    for _ in range(400):
        column = torch.eye(8).requires_grad_()
        loss.compute_loss_from_embeddings([torch.ones(8, 8), column]).backward()
        counts += (column.grad.abs().sum(dim=1) > 0).float()
    assert counts.min() > 0.8 * counts.max()


# --- the published code's defects (their behaviour in our words, which each of these tests rejects) -------------------


def published_negatives(scores, margin, k):
    """Indices of the k best after masking: with too few survivors they run into the masked ones."""
    own = scores.diagonal()[:, None]
    masked = scores.masked_fill(scores > own + margin, -torch.inf).fill_diagonal_(-torch.inf)
    return masked.topk(k, dim=1).indices


def published_loss(queries, positives, margin=0.1, k=8, temperature=0.02):
    """Gathers (N, 1 + k, D) vectors by index and scores them a second time."""
    queries, positives = torch.nn.functional.normalize(queries), torch.nn.functional.normalize(positives)
    chosen = published_negatives(queries @ positives.T, margin, k)
    candidates = torch.cat([positives[:, None], positives[chosen]], dim=1)  # (N, 1 + k, D)
    logits = torch.einsum("nd,nkd->nk", queries, candidates) / temperature
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long))


def test_defect_2_filtered_candidates_do_not_come_back():
    """One valid negative for three places, two false ones beside it: those must take no part."""
    query = torch.tensor([[1.0, 0.0, 0.0]])
    # Cosines to the query: the positive 0.5, two false negatives 0.9 and 0.8, a valid negative 0.1.
    targets = torch.tensor([[0.5, 0.866, 0.0], [0.9, 0.436, 0.0], [0.8, 0.0, 0.6], [0.1, 0.0, 0.995]])

    def ours(scores):
        chosen = hardest_valid_negatives(scores, torch.tensor([0]), k=3, margin=0.1)
        return info_nce(scores[:, 0], chosen.scores, temperature=0.2).sum()

    def published(scores):
        chosen = scores[0, published_negatives(scores.detach(), 0.1, 3)[0]]
        return -torch.log_softmax(torch.cat([scores[0, :1], chosen]) / 0.2, dim=0)[0]

    pushed = {}
    for function in (ours, published):
        leaf = targets.clone().requires_grad_()
        function(cosine_scores(query, leaf)).backward()
        assert leaf.grad[3].abs().sum() > 0
        pushed[function.__name__] = float(leaf.grad[1:3].abs().sum())
    assert pushed["ours"] == 0
    assert pushed["published"] > 0


def test_defect_3_copies_of_the_positive_are_no_negatives():
    """Half the targets repeat, as class names and yes/no do."""
    names = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    table = random_embeddings(2, 8)
    queries, positives = table[names] + 0.3 * random_embeddings(8, 8, seed=2), table[names]
    scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(positives).T
    published = published_negatives(scores, margin=0.1, k=3)
    assert (names[published] == names[:, None]).float().mean() > 0.7
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=3)
    ids = [torch.arange(100, 108), names]
    for labels, contents in ((names, None), (None, ids), (names, ids)):
        loss.compute_loss_from_embeddings([queries, positives], labels, contents)
        assert float(loss.last_metrics["false_negatives_by_identity"]) == 3
        assert float(loss.last_metrics["hard_negative_similarity"]) < scores.diagonal().mean() - 0.2


def test_defect_5_no_tensor_of_gathered_negatives():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    n, k, dim = 32, 8, 256
    columns = [random_embeddings(n, dim, seed=s).requires_grad_() for s in range(2)]
    with Largest() as published:
        published_loss(*columns).backward()
    with Largest() as ours:
        HardNegativeInfoNCELoss(None, num_hard_negatives=k).compute_loss_from_embeddings(columns).backward()
    assert published.numel >= n * (1 + k) * dim
    assert ours.numel == n * dim


# --- identities from features -----------------------------------------------------------------------------------------


def test_equal_texts_are_recognised_in_the_features(text_model):
    loss = HardNegativeInfoNCELoss(text_model, margin=None, num_hard_negatives=2)
    run(loss, text_model, (ANCHORS[:4], ["a cat", "a dog", "a cat", "the tree"]))
    assert float(loss.last_metrics["false_negatives_by_identity"]) == pytest.approx(2 / 4)


def test_content_id_is_preferred(text_model):
    columns = features(text_model, ANCHORS[:3], POSITIVES[:3])
    columns[0]["content_id"], columns[1]["content_id"] = torch.tensor([1, 2, 3]), torch.tensor([7, 7, 8])
    loss = HardNegativeInfoNCELoss(text_model, margin=None, num_hard_negatives=2)
    loss(columns)
    assert float(loss.last_metrics["false_negatives_by_identity"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2])])
def test_unknown_images_warn_once_unless_labelled(text_model, caplog, labels):
    loss = HardNegativeInfoNCELoss(text_model, num_hard_negatives=2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            columns = features(text_model, ANCHORS[:3], ["a cat", "a cat", "the tree"])
            columns[0]["pixel_values"] = torch.zeros(3, 3, 4, 4)
            loss(columns, labels)
    advice = [record for record in caplog.records if "unime_st.load_encoder" in record.getMessage()]
    assert len(advice) == (labels is None)
    assert float(loss.last_metrics["false_negatives_by_identity"]) == pytest.approx(2 / 3)  # the texts still count


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature.*above 0"),
        ({"temperature": float("nan")}, "temperature.*above 0"),
        ({"margin": float("inf")}, "None switches the filter off"),
        ({"num_hard_negatives": 0}, "None keeps all"),
        ({"negative_selection": "easy"}, "'hardest' or 'random'"),
        ({"negative_selection": "random", "num_hard_negatives": None}, "needs a `num_hard_negatives`"),
        ({"mini_batch_size": 0}, "mini_batch_size=0.*None embeds the batch at once"),
        ({"mini_batch_num_tokens": -1}, "mini_batch_num_tokens=-1"),
        ({"temperature": float("inf")}, "temperature.*above 0"),
        ({"temperature": "0.02"}, "`temperature='0.02'`.*a number"),
        ({"temperature": True}, "`temperature=True`"),
        ({"margin": float("nan")}, "margin=nan.*None switches the filter off"),
        ({"margin": float("-inf")}, "margin=-inf"),
        ({"margin": "0.1"}, "`margin='0.1'`"),
        ({"margin": False}, "`margin=False`"),
        ({"num_hard_negatives": -3}, "num_hard_negatives=-3.*None keeps all"),
        ({"num_hard_negatives": True}, "`num_hard_negatives=True`.*a whole number"),
        ({"num_hard_negatives": 8.0}, "`num_hard_negatives=8.0`.*a whole number"),
        ({"mini_batch_size": 2.5}, "`mini_batch_size=2.5`.*a whole number"),
        ({"mini_batch_size": True}, "`mini_batch_size=True`"),
        ({"mini_batch_num_tokens": "100"}, "`mini_batch_num_tokens='100'`"),
        ({"hard_negatives_warmup_steps": -1}, "`hard_negatives_warmup_steps=-1`"),
        ({"hard_negatives_warmup_steps": 0.1, "num_hard_negatives": 2}, "steps=0.1`.*a whole number"),
        ({"hard_negatives_warmup_steps": 5}, "`num_hard_negatives=None` always does. Give the number"),
        ({"directions": "query_to_doc"}, "`directions='query_to_doc'`"),
        ({"directions": None}, "`directions=None`"),
        ({"directions": ("query_to_doc", 1)}, "`directions=.*they must be"),
        ({"directions": ("doc_to_query",)}, "`directions=.*they must be"),
        ({"directions": ("query_to_doc", "query_to_query")}, "queries are not compared with queries"),
        ({"hardness_mode": "hardest"}, "`hardness_mode='hardest'`.*in_batch_negatives, hard_negatives"),
        ({"hardness_mode": "all_negatives"}, "weights nothing with `hardness_strength=0.0`. Give a strength"),
        ({"hardness_strength": 9.0}, "weights nothing with `hardness_mode=None`. Say which"),
        ({"hardness_mode": "all_negatives", "hardness_strength": -1.0}, "`hardness_strength=-1.0`"),
        ({"hardness_mode": "all_negatives", "hardness_strength": float("inf")}, "finite number"),
        ({"hardness_mode": "all_negatives", "hardness_strength": float("nan")}, "`hardness_strength=nan`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        HardNegativeInfoNCELoss(None, **arguments)


def test_directions_of_a_yaml_file_are_directions():
    assert HardNegativeInfoNCELoss(None, directions=list(BOTH)).get_config_dict()["directions"] == BOTH


def test_numbers_of_numpy_are_numbers():
    HardNegativeInfoNCELoss(
        None, temperature=np.float32(0.5), margin=np.float64(-0.1), num_hard_negatives=np.int64(2), mini_batch_size=None
    )


# --- few of a small batch, and nothing at all -------------------------------------------------------------------------


def warnings_of(caplog, loss, *batches):
    with caplog.at_level(logging.WARNING):
        for columns, labels in batches:
            loss.compute_loss_from_embeddings(columns, labels)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("k", "rows", "warned"),
    [(8, 32, True), (4, 32, True), (4, 33, False), (31, 32, False), (30, 32, True), (None, 32, False), (1, 4, True)],
)
def test_a_few_of_a_small_batch_are_warned_of_once(caplog, k, rows, warned):
    columns = [random_embeddings(rows, 8, seed=s) for s in range(2)]
    told = warnings_of(caplog, HardNegativeInfoNCELoss(None, num_hard_negatives=k), (columns, None), (columns, None))
    assert len(told) == warned
    assert not warned or f"`num_hard_negatives={k}` keeps a few of only {rows - 1} candidates" in told[0]


def test_evaluation_is_not_warned_of_few(caplog):
    columns = [random_embeddings(32, 8, seed=s) for s in range(2)]
    with torch.no_grad():
        assert not warnings_of(caplog, HardNegativeInfoNCELoss(None, num_hard_negatives=8), (columns, None))


@pytest.mark.parametrize("options", [{}, {"mini_batch_size": 2}], ids=str)
@pytest.mark.parametrize(
    ("rows", "arguments", "labels", "reason"),
    [
        (1, {}, None, "no candidate but its own positive. Raise `per_device_train_batch_size`"),
        (8, {}, [5] * 8, "none of its 8 rows has a negative left.* 7 for holding a right answer by content or label"),
        (6, {"margin": -2.5}, None, "none of its 6 rows.* a row loses 5 for scoring above it.*`margin=-2.5`"),
    ],
)
def test_a_step_without_any_negative_is_said_once(text_model, caplog, options, rows, arguments, labels, reason):
    loss = HardNegativeInfoNCELoss(text_model, **arguments, **options).train()
    labels = None if labels is None else torch.tensor(labels)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            value = loss(features(text_model, ANCHORS[:rows], POSITIVES[:rows]), labels)
            value.backward()
            assert value.item() == 0
    (told,) = [record.getMessage() for record in caplog.records if "Nothing is learned" in record.getMessage()]
    assert re.search(reason, told)


def test_a_loss_of_zero_with_negatives_is_not_warned_of(text_model, caplog):
    loss = HardNegativeInfoNCELoss(text_model, temperature=1e-6, margin=None).train()
    with caplog.at_level(logging.WARNING):
        value = loss(features(text_model, ANCHORS, ANCHORS), torch.arange(8))
    assert value.item() == 0
    assert not caplog.records


def test_more_hard_negatives_than_the_first_batch_offers():
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=8)
    small = [random_embeddings(4, 8, seed=s) for s in range(2)]
    advice = "`num_hard_negatives=8`, but each query has only 3 candidates.*per_device_train_batch_size.*gather_across"
    with pytest.raises(ValueError, match=advice):
        loss.compute_loss_from_embeddings(small)


def test_small_last_batch_and_evaluation_go_on():
    loss = HardNegativeInfoNCELoss(None, num_hard_negatives=8)
    small = [random_embeddings(4, 8, seed=s) for s in range(2)]
    with torch.no_grad():
        loss.compute_loss_from_embeddings(small)
    loss.compute_loss_from_embeddings([random_embeddings(9, 8, seed=s) for s in range(2)])
    keep_all = HardNegativeInfoNCELoss(None, num_hard_negatives=None)
    torch.testing.assert_close(
        loss.compute_loss_from_embeddings(small), keep_all.compute_loss_from_embeddings(small), rtol=0, atol=1e-6
    )


def test_bad_batches(text_model):
    columns = [random_embeddings(9, 8, seed=s) for s in range(2)]
    loss = HardNegativeInfoNCELoss(None)
    with pytest.raises(ValueError, match="one integer a row"):
        loss.compute_loss_from_embeddings(columns, torch.rand(9))
    with pytest.raises(ValueError, match="one integer a row"):
        loss.compute_loss_from_embeddings(columns, torch.ones(9, 2).long())
    with pytest.raises(ValueError, match="5 rows, but the embeddings have 9"):
        loss.compute_loss_from_embeddings(columns, torch.arange(5))
    with pytest.raises(ValueError, match="one integer a row"):
        loss.compute_loss_from_embeddings(columns, torch.full((9,), torch.nan))
    with pytest.raises(ValueError, match="each of the 2 columns, got 4"):
        loss.compute_loss_from_embeddings(columns, content_ids=[torch.arange(9)] * 4)
    with pytest.raises(ValueError, match=r"column 1 have shape \(4,\)"):
        loss.compute_loss_from_embeddings(columns, content_ids=[torch.arange(9), torch.arange(4)])
    with pytest.raises(ValueError, match=r"column 0.*float32"):
        loss.compute_loss_from_embeddings(columns, content_ids=[torch.rand(9), torch.arange(9)])
    with pytest.raises(ValueError, match=r"one shape \(B, D\).*\(9, 8\), \(7, 8\)"):
        loss.compute_loss_from_embeddings([columns[0], columns[1][:7]])
    with pytest.raises(ValueError, match=r"one shape \(B, D\)"):
        loss.compute_loss_from_embeddings(columns[:1])
    with pytest.raises(ValueError, match="3 rows, but the embeddings have 8"):
        HardNegativeInfoNCELoss(text_model)(features(text_model, ANCHORS, POSITIVES), torch.arange(3))
    with pytest.raises(ValueError, match="model=None"):
        loss(features(text_model, ANCHORS, POSITIVES))
    with pytest.raises(ValueError, match=r"got 1 column\(s\)"):
        HardNegativeInfoNCELoss(text_model)(features(text_model, ANCHORS))


def test_config_and_citation():
    arguments = {
        "temperature": 0.03,
        "margin": None,
        "num_hard_negatives": 3,
        "hard_negatives_warmup_steps": 5,
        "negative_selection": "random",
        "filter_explicit_negatives": False,
        "directions": ("query_to_doc", "doc_to_query"),
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": 9.0,
        "gather_across_devices": True,
        "mini_batch_size": 4,
        "mini_batch_num_tokens": 100,
    }
    loss = HardNegativeInfoNCELoss(None, **arguments)
    assert loss.get_config_dict() == arguments
    assert "2504.17432" in loss.citation
