"""What the tests of losses share."""

from functools import partial
from unittest.mock import patch

import torch

from unime_st.modules.speed import prefixes as shared_prefix
from unime_st.modules.speed.token_tree import pack_tree

ANCHORS = [
    "a red bus",
    "the small bird is near the tree",
    "a green train",
    "the dog",
    "a large house on the tree",
    "blue cat under a bus",
    "a small small dog",
    "the train is blue",
]
POSITIVES = [
    "the bus is red",
    "bird near a tree",
    "green large train",
    "a dog is the dog",
    "house on tree",
    "the cat is under the bus",
    "dog is small",
    "a blue train on a house",
]
NEGATIVES = [
    "the bus is green",
    "bird under a tree",
    "red large train",
    "a cat is the cat",
    "house near tree",
    "the cat is on the bus",
    "dog is large",
    "a red train under a house",
]


def features(model, *columns):
    """Preprocess each column anew, as the forward pass may change the features."""
    return [model.preprocess(list(column)) for column in columns]


def run(loss, model, columns, labels=None):
    """One step: the loss and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    value = loss(features(getattr(model, "module", model), *columns), labels)
    value.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return value.detach(), gradients


def assert_same_step(first, second, *, least=20, atol=1e-6):
    """Compare loss and every gradient, refusing to compare nothing or zeros."""
    assert torch.isfinite(first[0])
    assert first[0].item() > 1e-4, "the loss vanished, so its gradients prove nothing"
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=atol)
    assert first[1].keys() == second[1].keys()
    alive = [name for name, gradient in first[1].items() if gradient.abs().max() > 1e-4]
    assert len(alive) >= least, f"only {len(alive)} parameters have a gradient worth comparing"
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def packing_as_if_large():
    """A context in which batches are packed: attention costs a tiny model too much for long sequences to pay."""
    plan = partial(pack_tree, hidden_size=4096)
    return patch.object(shared_prefix, "pack_tree", lambda keys, mask, hidden_size, training: plan(keys, mask))
