"""Lists of candidates: prompts and tokens, scores against a bare model, and what is refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tiny import FAMILIES, picture, tiny_backbone
from unime_st.modules import ListwiseReranker, build_encoder, build_reranker, export_reranker, load_reranker
from unime_st.modules.reranker.lists import Numbers, find_numbers
from unime_st.rerank_prompts import LIST_PROMPTS, ListPrompt, list_template, plain_template

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "list_prompts.json").read_text())
RED, GREEN, WIDE = picture("red"), picture("green"), picture("white", (60, 20))
QUERY = {"image": RED, "text": "what is it?"}
BOTH = {"image": GREEN, "text": "this one"}
LISTS = [
    (QUERY, ["a red bus", "a boat", BOTH]),
    ("a red bus", [RED, GREEN, WIDE, "two buses", RED]),
    (WIDE, [BOTH]),
    (QUERY, [f"candidate {number}" for number in range(10)]),
    ("a boat", ["long " * 30, "short", "a boat"]),
    (QUERY, ["a red bus", "a boat", BOTH]),
    (BOTH, [GREEN] + [f"number {number}" for number in range(11)]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def of(family, *more):
        if (family, more) not in made:
            made[family, more] = tiny_backbone(family, tmp_path_factory.mktemp(family), words=["Yes", "No", *more])
        return made[family, more]

    return of


def bare(folder):
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()


def user_turn(query, candidates, words):
    """The published turn, built by hand: parts and images of one user message."""
    parts, images = [], []

    def say(item):
        item = {"text": item} if isinstance(item, str) else item if isinstance(item, dict) else {"image": item}
        if "image" in item:
            images.append(item["image"])
            parts.append({"type": "image"})
        if "text" in item:
            parts.append({"type": "text", "text": item["text"]})

    parts.append({"type": "text", "text": words.before_query})
    say(query)
    parts.append({"type": "text", "text": words.before_candidates})
    for number, candidate in enumerate(candidates, 1):
        parts.append({"type": "text", "text": f"({number}) "})
        say(candidate)
    return [{"role": "user", "content": parts}], images


def bare_scores(processor, model, template, asked, words):
    """The product of the probabilities of a number's tokens, each by a forward pass of its own."""
    messages, images = user_turn(*asked, words)
    text = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
    count = len(asked[1])
    tokenizer = processor.tokenizer

    def next_tokens(said):
        inputs = processor(images=[images] if images else None, text=[text + said], return_tensors="pt",
                           add_special_tokens=False)  # fmt: skip
        with torch.inference_mode():
            return model(**inputs).logits[0, -1].double().softmax(dim=0)

    found = []
    for number in range(1, count + 1):
        ends = ")" if 10 * number <= count and len(tokenizer.tokenize("10")) == 2 else ""
        tokens = tokenizer(f"{number}{ends}", add_special_tokens=False)["input_ids"]
        pieces = [f"{number}{ends}"[:end] for end in range(len(tokens))] if len(tokens) > 1 else [""]
        found.append(np.prod([float(next_tokens(f"Ans: ({piece}")[token])
                              for piece, token in zip(pieces, tokens, strict=True)]))  # fmt: skip
    return np.array(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_bare_model(folders, family):
    listwise = ListwiseReranker(build_reranker(folders(family), device="cpu"), max_candidates=12)
    scores = listwise.predict_lists(LISTS)
    processor, model = bare(folders(family))
    template = plain_template(model.config.model_type)
    for asked, own in zip(LISTS, scores, strict=True):
        expected = bare_scores(processor, model, template, asked, LIST_PROMPTS["unime_v2"])
        assert own.shape == expected.shape
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
        assert len(own) == 1 or np.ptp(np.log(expected)) > 0.1, "all scores are alike, so they prove nothing"
        assert 0 < own.sum() <= 1
    for size in (1, 7):
        for own, other in zip(scores, listwise.predict_lists(LISTS, batch_size=size), strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", GOLDEN)
def test_prompts_are_golden(folders, family):
    listwise = ListwiseReranker(build_reranker(folders(family), device="cpu"))
    encoder = listwise.model[0]
    lists = [(QUERY, ["a red bus", BOTH]), ("a bus", [GREEN, "two"])]
    features = encoder.preprocess_lists(lists, ["Ans: (", "Ans: (2)"], template=listwise.template)
    for row, golden in enumerate(GOLDEN[family]):
        tokens = features["input_ids"][row][features["attention_mask"][row].bool()]
        assert runs(encoder.tokenizer.decode(tokens)) == golden


def runs(words):
    """The prompt with each run of one image's placeholders as one."""
    for token in ("<image>", "<|image_pad|>", "<image_soft_token>"):
        while token * 2 in words:
            words = words.replace(token * 2, token)
    return words


def test_a_batch_of_lists_is_as_each_by_itself_and_in_any_order(folders):
    listwise = ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"), max_candidates=12)
    together = listwise.predict_lists(LISTS)
    for number in (3, 0, 5, 1):
        (alone,) = listwise.predict_lists([LISTS[number]])
        np.testing.assert_allclose(alone, together[number], rtol=1e-4, atol=1e-7)
    assert listwise.predict_lists([]) == []


def test_ranks_are_by_score_and_follow_the_order_of_candidates(folders):
    listwise = ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"))
    query, candidates = LISTS[0]
    (scores,) = listwise.predict_lists([(query, candidates)])
    ranked = listwise.rank(query, candidates)
    assert [entry["corpus_id"] for entry in ranked] == np.argsort(-scores).tolist()
    assert [entry["score"] for entry in ranked] == sorted(scores.tolist(), reverse=True)
    assert len(listwise.rank(query, candidates, top_k=2)) == 2
    (turned,) = listwise.predict_lists([(query, candidates[::-1])])
    assert np.abs(np.log(turned[::-1] / scores)).max() > 1e-3, "a list's order is part of the question"


def test_an_image_of_any_place_is_seen(folders):
    listwise = ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"))
    shown = [[RED, GREEN, WIDE], [GREEN, RED, WIDE], [RED, GREEN, GREEN], [RED, WIDE, GREEN]]
    scores = np.log(listwise.predict_lists([("which?", images) for images in shown]))
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(scores, 2)) > 3e-4


def test_ten_in_one_token_needs_no_second_look(folders):
    asked = ("a boat", [f"c{number}" for number in range(10)])
    sizes = []
    for more, rows in (((), 2), (("10",), 1)):
        listwise = ListwiseReranker(build_reranker(folders("qwen2_vl", *more), device="cpu"))
        sizes.clear()
        listwise.model[0].register_forward_hook(lambda _m, _given, out: sizes.append(len(out["causal_logits"])))
        (scores,) = listwise.predict_lists([asked])
        assert sum(sizes) == rows
        processor, model = bare(folders("qwen2_vl", *more))
        expected = bare_scores(processor, model, plain_template("qwen2_vl"), asked, LIST_PROMPTS["unime_v2"])
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
        nine = listwise.predict_lists([(asked[0], asked[1][:9])])[0]
        assert sum(sizes) == rows + 1
        assert nine.shape == (9,)


def test_what_shares_a_beginning_is_computed_once(folders):
    listwise = ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"))
    listwise.predict_lists([(QUERY, [f"candidate {number}" for number in range(10)])])
    prefixes = listwise.model[0].prefixes
    assert 0 < prefixes.computed < 0.6 * prefixes.padded


def test_a_saved_reranker_is_pairwise_and_stock_and_lists_work_on_it(folders, tmp_path):
    model = build_reranker(folders("qwen3_vl"), device="cpu")
    pairs = [("a bus", "two buses"), ("a boat", "a car")]
    before = ListwiseReranker(model).predict_lists(LISTS[:2]), model.predict(pairs)
    export_reranker(model, tmp_path / "reranker")
    loaded = load_reranker(tmp_path / "reranker", device="cpu")
    for own, other in zip(before[0], loaded.listwise().predict_lists(LISTS[:2]), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5)
    stock = CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    np.testing.assert_allclose(stock.predict(pairs), before[1], rtol=0, atol=1e-5)
    with pytest.raises(TypeError, match=r"is a CrossEncoder, but listwise reranking needs .*load_reranker"):
        ListwiseReranker(stock)
    with pytest.raises(TypeError, match="is a MultimodalSentenceTransformer"):
        ListwiseReranker(build_encoder(folders("qwen3_vl"), device="cpu"))


def test_words_of_ones_own_and_a_system_message_in_training(folders):
    words = ListPrompt("Q: ", "\nChoose:\n", number="[{n}] ", answer="Best: [{n}]")
    listwise = ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"), prompt=words)
    features, targets = listwise.answered([("a", ["b", RED])], [2], prompt="Be strict.")
    encoder = listwise.model[0]
    text = runs(encoder.tokenizer.decode(features["input_ids"][0]))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nBe strict.\nQ: a\nChoose:\n"
        "[1] b[2] <|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\nBest: [2]"
    )
    assert encoder.tokenizer.decode(targets[0]) == "Best: [2]"
    assert features["logits_to_keep"] == len("Best: [2]") + 1


def test_answers_of_several_lengths_are_padded_in_front(folders):
    listwise = ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"))
    _, targets = listwise.answered([("a", list("bcdefghijk"))] * 2, [10, 2])
    assert listwise.model[0].tokenizer.decode(targets[0]) == "Ans: (10)"
    assert targets[1][0] == -100
    assert listwise.model[0].tokenizer.decode(targets[1][1:]) == "Ans: (2)"


def test_long_candidates_are_cut_to_one_length(folders):
    model = build_reranker(folders("qwen2_vl"), device="cpu", max_seq_length=500)
    listwise = ListwiseReranker(model)
    lists = [("a query", ["x" * 150, "short", "y" * 200])]
    features = model[0].preprocess_lists(lists, ["Ans: ("], template=listwise.template)
    text = model[0].tokenizer.decode(features["input_ids"][0])
    assert features["input_ids"].shape[1] == 500
    assert "(2) short(3) y" in text
    assert text.endswith("assistant\nAns: (")
    shown = text.partition("Candidates:")[2]
    assert abs(shown.count("x") - shown.count("y")) <= 1
    assert 30 < shown.count("y") < 150
    model[0].max_seq_length = 300
    with pytest.raises(ValueError, match=r"Row 0 needs .* tokens for its media and instruction alone"):
        model[0].preprocess_lists([(RED, [RED, GREEN])], ["Ans: ("], template=listwise.template)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("a", []), r"List 1 has 0 candidates, but 1 to `max_candidates=3`"),
        (("a", ["b"] * 4), r"List 1 has 4 candidates.*Give the first of them, or raise"),
        (("a", ["b", None]), r"The candidate 1 of list 1: Row 1 is None"),
        ((None, ["b"]), r"The query of list 1: Row 1 is None"),
        (("a", ["b", ""]), r"The candidate 1 of list 1: Row 1 holds neither text nor an image"),
        (("a", ["b", {"image": "missing.png"}]), r"The candidate 1 of list 1: .*missing\.png"),
        (("a", ["<|image_pad|>"]), r"row 1\) holds '<\|image_pad\|>', which is for media"),
    ],
)
def test_bad_lists_are_named(folders, asked, message):
    listwise = ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"), max_candidates=3)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        listwise.predict_lists([("a", ["b"]), asked])


IMAGES_FIRST = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<|image_pad|>{% endif %}{% endfor %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
TEMPLATES = {
    r"does not keep it at its place.*must follow its number.*plain_template": IMAGES_FIRST,
    r"leaves out '<\|image_pad\|>'": "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endfor %}",
    r"leaves out 'I will provide": "nothing",
    r"cannot render a list": "{{ raise_exception('roles must alternate') }}",
    r"goes on after the answer's beginning|three images as 6": "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|image_pad|><|image_pad|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("message", TEMPLATES)
def test_templates_that_drop_or_move_something_are_refused(folders, message):
    with pytest.raises(ValueError, match=message):
        ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"), template=TEMPLATES[message])


def test_a_list_whose_image_is_dropped_and_one_without_scores_are_named(folders, monkeypatch):
    hides = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% elif "
        "'hide' not in (m.content | string) %}<|image_pad|>{% endif %}{% endfor %}{% endfor %}"
    )
    model = build_reranker(folders("qwen2_vl"), device="cpu")
    listwise = ListwiseReranker(model, template=hides)
    with pytest.raises(ValueError, match=r"Row 1 .*number of <\|image_pad\|> tokens|List 1 shows 2 image\(s\)"):
        listwise.predict_lists([("a", ["b", RED]), (RED, ["hide", GREEN])])
    plain = model[0].forward

    def broken(features, **options):
        output = plain(features, **options)
        return {**output, "causal_logits": torch.full_like(output["causal_logits"], torch.inf)}

    monkeypatch.setattr(model[0], "forward", broken)
    with pytest.raises(ValueError, match=r"The scores of list 0 are not finite.*float32 or bfloat16"):
        ListwiseReranker(model).predict_lists([("a", ["b", "c"])])


def test_the_familys_turn_is_a_way_out(folders):
    """LLaVA-OneVision's published template puts a turn's images first."""
    published = IMAGES_FIRST.replace("<|image_pad|>", "<image>")
    model = build_reranker(folders("llava_onevision"), device="cpu", processor_kwargs={"chat_template": published})
    with pytest.raises(ValueError, match="does not keep it at its place"):
        ListwiseReranker(model)
    ours = ListwiseReranker(model, template=plain_template("llava_onevision")).predict_lists(LISTS[:1])[0]
    plain = ListwiseReranker(build_reranker(folders("llava_onevision"), device="cpu")).predict_lists(LISTS[:1])[0]
    np.testing.assert_allclose(ours, plain, rtol=1e-5)


def test_numbers_without_tokens_of_their_own_are_refused(folders):
    encoder = build_reranker(folders("qwen2_vl"), device="cpu")[0]
    words = LIST_PROMPTS["unime_v2"]
    template = list_template(words, encoder.processor.chat_template)
    assert find_numbers(encoder, template, words, 12).of(12)[0] == (
        *encoder.tokenizer("1)", add_special_tokens=False)["input_ids"],
    )
    plain = AutoTokenizer.from_pretrained(folders("qwen2_vl"))
    for blended, message in (("(3", "no tokens of their own"), ("3)", "no tokens of their own")):
        encoder.processor.tokenizer = AutoTokenizer.from_pretrained(folders("qwen2_vl"))
        encoder.processor.tokenizer.add_tokens([AddedToken(blended)])
        with pytest.raises(ValueError, match=message):
            find_numbers(encoder, template, words, 5)
    encoder.processor.tokenizer = plain
    with pytest.raises(ValueError, match=r"'\{n\}' once"):
        ListPrompt("a", "b", number="1. ")
    with pytest.raises(ValueError, match="ends with its number"):
        ListPrompt("a", "b", answer="Best: {n}")


def test_numbers_are_closed_where_a_longer_one_begins_alike():
    numbers = Numbers((*((digit,) for digit in range(1, 10)), (1, 0), (1, 1)), 99)
    assert numbers.of(9) == [(digit,) for digit in range(1, 10)]
    assert numbers.of(11)[0] == (1, 99)
    assert numbers.of(11)[9:] == [(1, 0), (1, 1)]
    assert numbers.digits((1,)) == "1"
    assert not numbers.digits(())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_candidates": 1}, "max_candidates=1"),
        ({"max_candidates": 100}, "more than two digits"),
        ({"replaces": "last"}, "replaces='last'.*'first' or 'all'"),
        ({"prompt": "best"}, "prompt='best'.*unime_v2"),
    ],
)
def test_bad_options_are_named(folders, options, message):
    with pytest.raises(ValueError, match=message):
        ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu"), **options)
    with pytest.raises((ValueError, TypeError), match="batch_size=0"):
        ListwiseReranker(build_reranker(folders("qwen2_vl"), device="cpu")).predict_lists([], batch_size=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_videos_are_candidates_too(folders, family):
    listwise = ListwiseReranker(build_reranker(folders(family), device="cpu"))
    videos = [{"video": [picture(colour) for colour in shown]} for shown in (("red", "green"), ("white", "black"))]
    lists = [("which?", videos), ("which?", videos[::-1]), ("which?", ["a", RED]), (videos[0], ["b", "c"])]
    together = listwise.predict_lists(lists)
    for asked, own in zip(lists, together, strict=True):
        np.testing.assert_allclose(listwise.predict_lists([asked])[0], own, rtol=1e-5)
    assert np.abs(np.log(together[0] / together[1])).max() > 1e-4, "frames are not seen"
