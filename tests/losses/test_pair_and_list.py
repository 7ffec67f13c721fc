"""UniME-V2's reranker loss: against full logits and labels, on processes, resumed, and what it refuses."""

import copy

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from transformers import AutoModelForImageTextToText, AutoProcessor

from tiny import FAMILIES, picture, tiny_backbone
from two_processes import run_two
from unime_st import ListwiseReranker, build_reranker, export_reranker, load_reranker
from unime_st.losses import PairAndListLoss
from unime_st.rerank_prompts import LIST_PROMPTS, PAIR_PROMPTS, plain_template

RED, GREEN, WHITE = picture("red"), picture("green"), picture("white", (60, 20))
COLUMNS = [
    [{"image": RED, "text": "what is it?"}, "a boat", WHITE],
    ["a red bus", GREEN, "white paper"],
    ["a boat", "a car", {"image": RED, "text": "this"}],
    [RED, "a bus", "a bus"],
    ["a house", "a tree", "a tree"],
]
LABELS = torch.tensor([[0.9, 0.1, 0.2, 0.1], [0.8, 0.1, -1.0, 0.3], [0.9, 0.1, -1.0, -1.0]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = tiny_backbone(family, tmp_path_factory.mktemp(family), words=["Yes", "No"])
        return made[family]

    return of


def turn(processor, template, parts, answer):
    """Tokens of one user turn with an answer, and how many of them are the answer's."""
    images = [part for part in parts if not isinstance(part, str)]
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
    text = processor.apply_chat_template([{"role": "user", "content": content}], chat_template=template, tokenize=False)
    inputs = processor(images=[images] if images else None, text=[text + answer], return_tensors="pt",
                       add_special_tokens=False)  # fmt: skip
    return inputs, len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])


def parts_of(item):
    item = item if isinstance(item, dict) else {"text": item} if isinstance(item, str) else {"image": item}
    return [item[name] for name in ("image", "text") if name in item]


def asked(query, candidates, answer):
    """Parts of a pair (one candidate, an answer of words) or list, by hand."""
    if isinstance(answer, str):
        words = PAIR_PROMPTS["unime_v2"]
        return [words.before_query, *parts_of(query), words.before_candidate, *parts_of(candidates[0])], answer
    words = LIST_PROMPTS["unime_v2"]
    parts = [words.before_query, *parts_of(query), words.before_candidates]
    for number, candidate in enumerate(candidates, 1):
        parts += [f"({number}) ", *parts_of(candidate)]
    return parts, f"Ans: ({answer})"


def oracle(folder, questions, dtype):
    """The mean over answers' tokens of the cross-entropy of full logits, each question by itself, and gradients."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    template = plain_template(model.config.model_type)
    value = 0
    for group in questions:
        total, count = 0, 0
        turns = [turn(processor, template, parts, answer) for parts, answer in group]
        longest = max(inputs["input_ids"].shape[1] for inputs, _ in turns)
        for inputs, length in turns:
            own = inputs["input_ids"].shape[1]
            if "qwen" not in model.config.model_type:  # they count from where a row begins, the others padding too
                inputs["position_ids"] = torch.arange(longest - own, longest)[None]
            inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}
            logits = model(**inputs).logits[0]
            labels = inputs["input_ids"][0].clone()
            labels[:-length] = -100
            total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            count += length
        value = value + total / count
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_those_of_full_logits(folders, family, dtype):
    model = build_reranker(folders(family), device="cpu", torch_dtype=dtype).eval()
    loss = PairAndListLoss(model)
    loss.draw = lambda available: ([2, 1, 1], [1, 0, 1])
    found = loss(COLUMNS, LABELS)
    value = found["pair"] + found["list"]
    value.backward()
    q, p, first, second, _ = COLUMNS
    questions = [
        [asked(q[i], [p[i]], "Yes") for i in range(3)] + [asked(q[i], [first[i]], "No") for i in range(3)],
        [asked(q[0], [first[0], p[0], second[0]], 2), asked(q[1], [p[1], first[1]], 1),
         asked(q[2], [first[2], p[2]], 2)],
    ]  # fmt: skip
    expected, gradients = oracle(folders(family), questions, dtype)
    atol = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(value.detach(), expected, rtol=atol, atol=atol)
    own = {name: p.grad for name, p in model[0].model.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    assert sum(float(gradient.abs().max()) > 1e-3 for gradient in own.values()) > 20
    # Of the largest gradient. FastVLM's convolutions sum over whole images; Gemma3's norms are always in float32.
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    atol = 1e-5 if dtype == torch.float32 else atol  # kernels of other versions sum in another order
    atol = {("fast_vlm", torch.float32): 2e-3, ("gemma3", torch.float64): 1e-7}.get((family, dtype), atol)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            own[name] / scale, gradient / scale, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_only_answers_are_computed_over_the_vocabulary(folders):
    model = build_reranker(folders("qwen2_vl"), device="cpu")
    shapes = []
    model[0].register_forward_hook(lambda _module, _given, output: shapes.append(output["causal_logits"].shape[:2]))
    PairAndListLoss(model)(COLUMNS)
    assert shapes == [(6, 1), (3, 9)], "of a pair the last token, of a list those before 'Ans: (2)' byte by byte"


def test_rows_of_fewer_negatives_and_places_that_are_drawn(folders):
    model = build_reranker(folders("qwen2_vl"), device="cpu").train()
    loss = PairAndListLoss(model, max_negatives=3)
    torch.manual_seed(0)
    drawn = [loss.draw([1, 2, 5]) for _ in range(300)]
    found = [{(counts[row], places[row]) for counts, places in drawn} for row in range(3)]
    assert found == [{(n, place) for n in range(1, most + 1) for place in range(n + 1)} for most in (1, 2, 3)]
    asked = []
    plain = loss._lists.answered
    loss._lists.answered = lambda lists, numbers, **more: (asked.extend(zip(lists, numbers, strict=True)),
                                                           plain(lists, numbers, **more))[1]  # fmt: skip
    for _ in range(10):
        loss(COLUMNS, list(LABELS))
    for ((query, candidates), number), row in zip(asked, [0, 1, 2] * 10, strict=True):
        wrong = [COLUMNS[2 + k][row] for k in range(3) if LABELS[row, 1 + k] >= 0]
        assert query == COLUMNS[0][row]
        assert candidates[number - 1] == COLUMNS[1][row]
        assert candidates[: number - 1] + candidates[number:] == wrong[: len(candidates) - 1]


def test_evaluation_is_the_same_each_time(folders):
    model = build_reranker(folders("qwen2_vl"), device="cpu").eval()
    loss = PairAndListLoss(model)
    assert loss.draw([3, 9, 2]) == ([3, 4, 2], [0, 1, 2])
    first, again = loss(COLUMNS), loss(COLUMNS)
    assert {name: float(value) for name, value in first.items()} == {n: float(v) for n, v in again.items()}


ROWS = {
    "anchor": ["a red bus", "a green boat", "a blue car", "a white house", "a tree", "a red cat", "a dog", "a bird"],
    "positive": ["bus red", "boat green", "car blue", "house white", "tree", "cat red", "dog", "bird"],
    "negative_1": ["bus blue", "boat red", "car red", "house red", "bush", "cat blue", "cat", "fish"],
    "negative_2": ["car red", "boat", "boat blue", "house", "house", "dog red", "bird", "dog"],
    "label": [[0.9, 0.1, 0.1 if row % 3 else -1.0] for row in range(8)],
}


def by_row(available):
    """Draws that are the same however rows are spread, for all rows are alike in this."""
    return [1] * len(available), [1] * len(available)


def train(model, folder, *, per_device=4, steps=4, save=None, resume=None, draw=None, rows=None):
    loss = PairAndListLoss(model)
    loss.draw = draw or loss.draw
    settings = CrossEncoderTrainingArguments(
        str(folder), per_device_train_batch_size=per_device, max_steps=steps, learning_rate=0.02, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, seed=0, save_strategy="steps" if save else "no", save_steps=save or 500,
        dataloader_drop_last=True,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(model=model, args=settings, train_dataset=Dataset.from_dict(rows or ROWS), loss=loss)
    trainer.train(resume_from_checkpoint=resume)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trained, [log for log in trainer.state.log_history if "loss" in log]


def test_a_resumed_run_ends_at_the_same_weights(folders, tmp_path):
    def fresh():
        return build_reranker(folders("qwen2_vl"), device="cpu")

    whole, logs = train(fresh(), tmp_path / "whole")
    train(fresh(), tmp_path / "killed", steps=2, save=2)
    resumed, rest = train(fresh(), tmp_path / "killed", resume=str(tmp_path / "killed" / "checkpoint-2"))
    before = {name: p.detach() for name, p in fresh().named_parameters()}
    assert sum(not torch.equal(before[name], value) for name, value in whole.items()) > 20
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert [log["loss"] for log in rest[-2:]] == [log["loss"] for log in logs[-2:]]
    assert all(log["pair"] + log["list"] == pytest.approx(log["loss"], abs=1e-3) for log in logs)


def pictured(rows):
    """The same rows with pictures of some, so that a process may have none."""
    names = [name for name in rows if name != "label"]
    cells = {name: [{"text": text} for text in rows[name]] for name in names}
    for row, name, colour in ((0, "anchor", "red"), (3, "negative_1", "green"), (5, "positive", "blue")):
        cells[name][row]["image"] = picture(colour)
    return {**cells, "label": rows["label"]}


def job(_rank, folder, backbone, images):
    rows = pictured(ROWS) if images else ROWS
    weights, logs = train(build_reranker(backbone, device="cpu"), folder, per_device=2, draw=by_row, rows=rows)
    return {"weights": weights, "losses": [log["loss"] for log in logs]}


@pytest.mark.parametrize("images", [False, True], ids=["texts", "images"])
def test_two_processes_train_as_one(folders, tmp_path, images):
    """With all weights trained, as DistributedDataParallel is by default: it looks for unused weights."""
    backbone = folders("qwen2_vl")
    results = run_two(job, tmp_path, str(tmp_path), str(backbone), images)
    rows = pictured(ROWS) if images else ROWS
    weights, logs = train(build_reranker(backbone, device="cpu"), tmp_path, draw=by_row, rows=rows)
    start = dict(build_reranker(backbone, device="cpu").named_parameters())
    moved = {name for name, value in weights.items() if (value - start[name]).abs().max() > 1e-3}
    assert len(moved) > 20
    assert any("visual" in name for name in moved) == images
    for result in results:
        for name, value in weights.items():
            torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: n + m)
    assert sum(result["losses"][0] for result in results) / 2 == pytest.approx(logs[0]["loss"], abs=1e-3)


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_changes_no_gradient(folders, adapters):
    found = []
    for options in (None, {"use_reentrant": False}):
        torch.manual_seed(0)
        model = build_reranker(folders("qwen2_5_vl"), device="cpu", peft_config=adapters).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if options:
            model.gradient_checkpointing_enable(options)
        loss = PairAndListLoss(model)
        loss.draw = lambda available: ([2, 1, 1], [1, 0, 1])
        sum(loss(COLUMNS, LABELS).values()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert sum(float(gradient.abs().max()) > 1e-3 for gradient in found[0].values()) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_learns_both_forms_and_what_is_saved_is_stock(folders, tmp_path):
    model = build_reranker(folders("qwen2_5_vl"), device="cpu", peft_config=True)
    colours = ["red", "green", "white", "black"]
    rows = [
        {"anchor": colours[k % 4], "positive": {"image": picture(colours[k % 4])}}
        | {f"negative_{n}": {"image": picture(colours[(k + n) % 4])} for n in (1, 2, 3)}
        for k in range(16)
    ]
    settings = CrossEncoderTrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=8, num_train_epochs=40, learning_rate=0.005, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=10, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(model, settings, Dataset.from_list(rows), loss=PairAndListLoss(model))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["pair"] < 0.8 * logs[0]["pair"]
    assert logs[-1]["list"] < 0.5 * logs[0]["list"]
    folder = export_reranker(model, tmp_path / "reranker")
    pairs = [("red", picture("red")), ("red", picture("green"))]
    loaded = load_reranker(folder, device="cpu")
    torch.testing.assert_close(
        torch.tensor(CrossEncoder(str(folder), device="cpu").predict(pairs)), torch.tensor(model.predict(pairs))
    )
    lists = [("red", [picture(colour) for colour in colours])]
    before, after = (ListwiseReranker(one).predict_lists(lists)[0] for one in (model, loaded))
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-4, atol=1e-6)
    assert after.sum() > 0.5, "the answers' form was learnt"


def test_bad_input_is_named(folders, tmp_path):
    model = build_reranker(folders("qwen2_vl"), device="cpu")
    loss = PairAndListLoss(model)
    with pytest.raises(ValueError, match=r"needs the columns .*, got 2 column"):
        loss(COLUMNS[:2])
    with pytest.raises(ValueError, match=r"label of row 0 holds 3 scores, but there are 4"):
        loss(COLUMNS, LABELS[:, :3])
    with pytest.raises(ValueError, match="Row 1 of the batch has no negative"):
        loss(COLUMNS, torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.9, -1, -1, -1], [0.9, 0.1, 0.1, 0.1]]))
    with pytest.raises(ValueError, match=r"The candidate of pair 1: Row 1 is None"):
        loss([["a"], ["b"], [None]])
    with pytest.raises(ValueError, match="max_negatives=0"):
        PairAndListLoss(model, max_negatives=0)
    with pytest.raises(ValueError, match="prompt='best'"):
        PairAndListLoss(model, prompt="best")
    with pytest.raises(TypeError, match="is a str, but PairAndListLoss trains"):
        PairAndListLoss("model")
    export_reranker(model, tmp_path / "stock")
    with pytest.raises(TypeError, match="is a CrossEncoder, but PairAndListLoss trains"):
        PairAndListLoss(CrossEncoder(str(tmp_path / "stock"), device="cpu"))
    assert loss.get_config_dict() == {"prompt": "unime_v2", "template": None, "max_negatives": 4}
    assert "2510.13515" in loss.citation
    assert copy.deepcopy(loss)(COLUMNS, LABELS)["pair"] > 0
