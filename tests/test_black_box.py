"""A black box: log-probabilities from a real HTTP endpoint, keys from a local encoder."""

import json
import math
import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import make_world, refused, run
from completions_server import serving
from memlm import BlackBox, Datastore, KnnMixture, evaluate, explain
from memlm.cache import Cache
from memlm.errors import ConfigError, DatastoreMismatch, EndpointError
from memlm.evaluation import tune_report
from memlm.evidence import join_beliefs
from memlm.mixtures import CacheMixture, SharedCacheMixture
from memlm.models._black_box import likeliest, rest_bucket
from memlm.models._token_names import UNKNOWN, TokenNames
from oracle import teacher_forced
from tiny_memories import TEXTS, documents, lm_of, store
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

NEW = ["the letter was in the house and it was the morning", "naïve 日本語: rain was on the bird 🙂 in a box"]
KNN = KnnMixture(interpolation_weight=0.4, temperature=50.0, k=16)
SECRET = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick_and_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("memlm.models._endpoint._FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def lm():
    return lm_of("llama", context=12, stride=20)


@pytest.fixture(scope="module")
def memory(lm, tmp_path_factory):
    return store(lm, TEXTS, tmp_path_factory.mktemp("black") / "memory")


@pytest.fixture
def server(lm):
    with serving(lm.model, lm.tokenizer) as server:
        yield server


def box_of(server, encoder, **settings):
    return BlackBox(server.url, "served", encoder, **settings)


def sequences_of(lm, texts=NEW):
    return [lm.tokenize(document).ids for document in documents(texts)]


def scored(lm, texts=NEW, beliefs=True):
    """Return log p, keys and belief of all targets, in order."""
    batches = list(lm.score(sequences_of(lm, texts), beliefs=beliefs))
    order = torch.cat([batch.rows for batch in batches]).argsort()
    belief = None
    if beliefs:
        belief = join_beliefs([batch.belief for batch in batches]).rows(order)
    return *(torch.cat([getattr(b, name) for b in batches])[order] for name in ("log_probs", "keys")), belief


def windows_log_probs(lm, texts=NEW):
    """Return targets and the whole log p before each, float64, by an own cut into windows."""
    targets, rows = [], []
    for ids in sequences_of(lm, texts):
        for target in range(1, len(ids)):
            first = 1 + lm.windows.stride * ((target - 1) // lm.windows.stride)
            log_probs, _ = teacher_forced(lm.model, lm.site, ids[max(0, first - lm.windows.context) : target])
            rows.append(np.asarray(log_probs[-1], np.float64)), targets.append(ids[target])
    return np.array(targets), np.array(rows)


@pytest.mark.parametrize("names", ["ids", "vocabulary"])
def test_with_all_log_probs_it_is_the_white_box(server, lm, names):
    server.names = names
    white, white_keys, white_belief = scored(lm)
    black, black_keys, belief = scored(box_of(server, lm, top=VOCAB_SIZE))
    assert torch.allclose(black, white, atol=1e-4)
    assert torch.allclose(black_keys, white_keys, atol=1e-5)
    for name in ("keys", "last", "top", "confidence", "entropy"):
        assert torch.allclose(getattr(belief, name), getattr(white_belief, name), atol=1e-4), name
    assert belief.normalizer.isnan().all()
    assert white.std() > 0.1
    assert max(len(request["prompt"]) for request in server.requests) > 1, "several windows a request"
    assert white_belief.entropy.std() > 0.01


def test_evaluate_explain_and_the_adapter_give_the_white_box_numbers(server, lm, memory):
    box = box_of(server, lm, top=VOCAB_SIZE)
    text = documents(NEW * 3)
    options = {"kind": "adapter", "max_k": 16, "show_progress": False}
    white, black = tune_report(lm, memory, text, **options), tune_report(box, memory, text, **options)
    assert black.lm_perplexity == pytest.approx(white.lm_perplexity, rel=1e-4)
    assert black.perplexity == pytest.approx(white.perplexity, rel=1e-3), "fitted to nearly the same numbers"
    for mixture in (KNN, white.best):
        by_white, by_black = (evaluate(one, documents(NEW), memory, mixture, show_progress=False) for one in (lm, box))
        assert np.abs(by_white.lm_log_probs - by_black.lm_log_probs).max() < 1e-4
        assert np.abs(by_white.log_probs - by_black.log_probs).max() < 1e-4
        assert np.abs(by_white.log_probs - by_white.lm_log_probs).max() > 0.01
        explained = explain(box, NEW[0], memory, mixture).to_dict()
        expected = explain(lm, NEW[0], memory, mixture).to_dict()
        assert [token["text"] for token in explained["tokens"]] == [token["text"] for token in expected["tokens"]]
        for one, other in zip(explained["tokens"], expected["tokens"], strict=True):
            assert one["mixture"] == pytest.approx(other["mixture"], rel=1e-3)


@pytest.mark.parametrize("kind", ["learned", "auto"])
def test_other_kinds_are_tuned_as_well(server, lm, memory, kind, quick_choice):
    options = {"kind": kind, "max_k": 16, "show_progress": False}
    report = tune_report(box_of(server, lm), memory, documents(NEW * 3), **options)
    assert math.isfinite(report.perplexity)


@pytest.mark.parametrize("names", ["ids", "vocabulary"])
def test_with_twenty_log_probs_the_rest_is_one_outcome(server, lm, names):
    server.names = names
    log_probs, _, belief = scored(box_of(server, lm, top=20))
    targets, whole = windows_log_probs(lm)
    rows = np.arange(len(targets))
    best = np.sort(whole, axis=1)[:, ::-1][:, :20]
    rest = 1 - np.exp(best).sum(axis=1)
    entropy = -(np.exp(best) * best).sum(axis=1) - rest * np.log(rest)
    assert np.abs(log_probs.numpy() - whole[rows, targets]).max() < 1e-4
    assert belief.top.tolist() == whole.argmax(axis=1).tolist()
    assert np.abs(belief.confidence.numpy() - best[:, 0]).max() < 1e-4
    assert np.abs(belief.entropy.numpy() - entropy).max() < 1e-4
    assert (entropy < -(np.exp(whole) * whole).sum(axis=1)).all(), "never too high"
    outside = whole[rows, targets] < best[:, -1]
    assert outside.sum() > 10, "some targets were added to the twenty by the server, and must not show"


@pytest.mark.parametrize("added", ["first", "last"])
@pytest.mark.parametrize("names", ["ids", "vocabulary", "decoded"])
def test_the_belief_does_not_depend_on_the_target(server, lm, names, added):
    """λ is made of it: a mixture that knows the target is no distribution."""
    server.names, server.added = names, added
    for top, text in [(5, "the cat was"), (20, "naïve 日"), (80, "a bird")]:
        ids = lm.tokenize(documents([text])[0]).ids[:-1]
        several = [np.array([*ids[-5:], token]) for token in range(0, VOCAB_SIZE, 8)]
        batches = list(box_of(server, lm, top=top).score(several, beliefs=True))
        rows = torch.cat([batch.rows for batch in batches])
        last = rows % 5 == 4
        told = torch.stack([torch.cat([batch.belief[part] for batch in batches])[last].double() for part in (2, 3, 4)])
        assert told.shape[1] == len(several)
        assert np.ptp(told.numpy(), axis=1).max() < 1e-5


class Named(dict):
    """Names of tokens, of which some are shared."""

    def __init__(self, names):
        super().__init__({name: names.index(name) if names.count(name) == 1 else UNKNOWN for name in names})
        self.tokenizer = names


@given(st.data())
@settings(max_examples=100)
def test_what_is_known_of_likely_tokens_does_not_depend_on_the_target(data):
    """Whatever names are shared, and whichever of their numbers a server tells."""
    names = data.draw(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=9))
    top = data.draw(st.integers(1, len(names)))
    scores = np.array(data.draw(st.lists(st.floats(-8, 0), min_size=len(names), max_size=len(names), unique=True)))
    log_probs = (scores - np.logaddexp.reduce(scores)).tolist()
    best = sorted(range(len(names)), key=lambda token: -log_probs[token])[:top]
    known = []
    for target in range(len(names)):
        order = data.draw(st.permutations(sorted({*best, target})))
        told = {names[token]: log_probs[token] for token in order}
        known.append(likeliest(told, names[target], Named(names), top))
    assert known.count(known[0]) == len(known)
    unique = [token for token in best if names.count(names[token]) == 1]
    if len(unique) == top:
        assert known[0] == {token: log_probs[token] for token in unique}
    certain = {token for token in unique if log_probs[token] > 0.01 - math.log(top + 1)}
    assert certain <= set(known[0]) <= set(unique)


def test_a_target_of_shared_name_that_the_server_added_does_not_show():
    """What is told without it is known for sure, and less likely than 1 / (top + 1)."""
    names, expected = Named(["a", "b", "b"]), {0: math.log(0.4)}
    assert likeliest({"a": math.log(0.4)}, "a", names, 1) == expected
    for told in ({"a": math.log(0.4), "b": math.log(0.3)}, {"b": math.log(0.3), "a": math.log(0.4)}):
        assert likeliest(told, "b", names, 1) == expected


def test_rest_bucket_by_hand():
    told = [[math.log(0.25), math.log(0.5)], [0.0], [math.log(0.1)] * 3 + [-9999.0], []]
    confidence, entropy = rest_bucket(told, 2)
    assert confidence == pytest.approx([math.log(0.5), 0, math.log(0.1), math.log(1 / 3)])
    assert entropy == pytest.approx([1.5 * math.log(2), 0, -0.2 * math.log(0.1) - 0.8 * math.log(0.8), 0])
    assert rest_bucket([[]], 2)[1] == 0


def test_another_encoder_makes_the_keys(lm, tmp_path):
    """The model's probabilities and the encoder's neighbors, against either alone."""
    encoder = lm_of("gpt2", context=12, stride=20)
    memory = store(encoder, TEXTS, tmp_path / "memory")
    with serving(lm.model, lm.tokenizer) as server:
        box = box_of(server, encoder)
        assert box.identity == encoder.identity
        black = evaluate(box, documents(NEW), memory, KNN, show_progress=False)
        own = evaluate(encoder, documents(NEW), memory, KNN, show_progress=False)
        alone = np.concatenate([scored(lm, beliefs=False)[0].numpy()])
        with pytest.raises(DatastoreMismatch):
            evaluate(box_of(server, lm), documents(NEW), memory, KNN, show_progress=False)
    assert np.abs(black.lm_log_probs - alone).max() < 1e-4
    assert np.abs(own.lm_log_probs - alone).max() > 0.1
    weight = KNN.interpolation_weight
    by_memory = np.exp(own.log_probs) - (1 - weight) * np.exp(own.lm_log_probs)
    expected = np.log(by_memory + (1 - weight) * np.exp(alone))
    assert np.abs(black.log_probs - expected).max() < 1e-3


def test_a_cache_of_the_past(server, lm):
    box = box_of(server, lm)
    linear = CacheMixture(interpolation_weight=0.2, scale=0.1, length=32)
    options = {"show_progress": False}
    by_white, by_black = (evaluate(one, documents(NEW), Cache(32), linear, **options) for one in (lm, box))
    assert np.abs(by_white.log_probs - by_black.log_probs).max() < 1e-4
    shared = SharedCacheMixture(bias=0.0, scale=0.1, length=32)
    evaluate(lm, documents(NEW), Cache(32), shared, **options)
    with pytest.raises(ConfigError, match="normalizer of the model's logits, which a black box does not tell"):
        evaluate(box, documents(NEW), Cache(32), shared, **options)


def test_tokens_by_decoded_text(server, lm):
    """Parts of characters have one text in common, hide each other, and tell no id; whole words are told apart."""
    server.names = "decoded"
    white, _, _ = scored(lm)
    black, _, belief = scored(box_of(server, lm))
    _, whole = windows_log_probs(lm)
    assert torch.allclose(black, white, atol=1e-4)
    best = torch.from_numpy(whole.argmax(axis=1))
    shared = torch.tensor([lm.tokenizer.decode([token]) == "�" for token in best.tolist()])
    certain = ~shared & torch.from_numpy(whole.max(axis=1) > math.log(1 / 20))
    assert belief.top[certain].equal(best[certain])
    assert certain.float().mean() > 0.2
    assert 0 < shared.float().mean() < 0.8
    assert not (belief.top[shared] == best[shared]).any()


def test_a_name_that_nobody_knows_is_left_to_the_rest(server, lm):
    """It may be that of several tokens; what is certain beside it counts."""

    def rename(tops):
        return [
            top and {"bytes:\\xf0" if p == max(top.values()) else name: p for name, p in top.items()} for top in tops
        ]

    _, whole = windows_log_probs(lm)
    server.change = edit(top_logprobs=rename)
    *_, belief = scored(box_of(server, lm))
    second = np.sort(whole, axis=1)[:, -2]
    some = second > math.log(1 / 20)
    assert 0.1 < some.mean() < 0.9
    np.testing.assert_allclose(belief.confidence[some], second[some], atol=1e-4)
    assert (belief.top[some].numpy() == whole.argsort(axis=1)[some, -2]).all()
    none = second < math.log(1 / 22)
    np.testing.assert_allclose(belief.confidence[none], -math.log(21), atol=1e-6)
    assert (belief.top[none] == UNKNOWN).all()
    assert (belief.entropy[none] == 0).all()


def test_names_of_tokens():
    tokenizer = tiny_tokenizer()
    names = TokenNames(tokenizer)
    the = tokenizer.convert_tokens_to_ids("Ġthe")
    assert names["Ġthe"] == names[" the"] == names[f"token_id:{the}"] == the
    assert names["�"] == names["bytes:\\xe2"] == names["token_id:x"] == UNKNOWN


def test_a_strict_server_is_asked_again_without_the_extra_field(server, lm):
    server.strict, server.names = True, "vocabulary"
    black, _, _ = scored(box_of(server, lm))
    assert torch.allclose(black, scored(lm)[0], atol=1e-4)
    extra = ["return_tokens_as_token_ids" in request for request in server.requests]
    assert extra[0]
    assert not any(extra[1:])


def test_what_is_asked(server, lm):
    list(box_of(server, lm, api_key=SECRET, top=7).score(sequences_of(lm), beliefs=True))
    list(box_of(server, lm).score(sequences_of(lm)))
    first, last = server.requests[0], server.requests[-1]
    assert {name: first[name] for name in ("model", "max_tokens", "temperature", "echo", "logprobs")} == {
        "model": "served",
        "max_tokens": 1,
        "temperature": 0,
        "echo": True,
        "logprobs": 7,
    }
    assert last["logprobs"] == 1, "without beliefs, the targets alone"
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert "Authorization" not in server.headers[-1]
    whole = sequences_of(lm)[0].tolist()
    assert 21 < len(whole) < 41, "two windows: 20 targets, and the rest with 12 tokens of context"
    assert whole[:21] in first["prompt"]
    assert whole[9:] in first["prompt"]


def test_the_logits_of_the_encoder_are_not_computed(server, lm, monkeypatch):
    monkeypatch.setattr(lm.model.lm_head, "forward", lambda *_: pytest.fail("the output embedding ran"))
    with serving(tiny_model("llama"), lm.tokenizer) as other:
        assert len(scored(box_of(other, lm))[0]) > 50


# Everything that can go wrong


def shift(lists, by):
    """Move log-probabilities against their tokens."""

    def change(answer):
        for choice in answer["choices"]:
            told = choice["logprobs"]
            for name in lists:
                moved = told[name][1:]
                told[name] = [told[name][0], *moved[by:], *moved[:by]]
        return answer

    return change


ALL = ("tokens", "token_logprobs", "top_logprobs")


@pytest.mark.parametrize("names", ["ids", "vocabulary"])
def test_shifted_positions_are_refused(server, lm, names):
    """Negative control: what the tests above compare would not survive a shift by one, and it is noticed."""
    server.names = names
    server.change = shift(("token_logprobs", "top_logprobs"), 1)
    with pytest.raises(EndpointError, match="not shifted"):
        scored(box_of(server, lm, top=VOCAB_SIZE))
    server.change = shift(ALL, 1)
    with pytest.raises(EndpointError, match="calls token 1 of a window"):
        scored(box_of(server, lm))


def test_a_shift_that_cannot_be_noticed_gives_other_numbers(server, lm):
    """Negative control: without alternatives to compare with, the comparison above is what fails."""

    def without_top(answer):
        answer = shift(("token_logprobs",), 1)(answer)
        for choice in answer["choices"]:
            choice["logprobs"]["top_logprobs"] = [{} for _ in choice["logprobs"]["tokens"]]
        return answer

    server.change = without_top
    black, _, _ = scored(box_of(server, lm), beliefs=False)
    assert (black - scored(lm, beliefs=False)[0]).abs().max() > 0.1


def edit(**changes):
    """Change lists of every choice: a function of the list, or what to put in its place."""

    def change(answer):
        for choice in answer["choices"]:
            for name, new in changes.items():
                choice["logprobs"][name] = new(choice["logprobs"][name]) if callable(new) else new
        return answer

    return change


def no_logprobs(answer):
    return {"choices": [{**choice, "logprobs": None} for choice in answer["choices"]]}


def numbered(index):
    """Give every choice the same index."""
    return lambda answer: {"choices": [{**choice, "index": index} for choice in answer["choices"]]}


def every(function):
    return edit(**{name: function for name in ALL})


ANSWERS = {
    "no JSON": (lambda answer: b"<html>It works!</html>", r"something else than JSON \('<html>It works!</html>'\)"),
    "a list": (lambda answer: [1, 2], 'without a list of "choices"'),
    "no choices": (lambda answer: {"object": "list"}, 'without a list of "choices"'),
    "one choice": (lambda answer: {"choices": answer["choices"][:1]}, "gives 1 choices for"),
    "no logprobs": (no_logprobs, "gives no logprobs with tokens, token_logprobs, top_logprobs; expected completions"),
    "no top": (edit(top_logprobs=None), "gives no logprobs with"),
    "no echo": (every(lambda told: told[-1:]), "tells of 1 tokens for a prompt of .*must support echo"),
    "fewer": (every(lambda told: told[:-3]), "its context must hold the window and one token more"),
    "more": (every(lambda told: [*told, None, None]), "its tokenizer may be another, or it adds a start token"),
    "start token": (every(lambda told: [told[0], *told]), "its tokenizer may be another"),
    "null": (edit(token_logprobs=lambda told: [None] * len(told)), "something else than a log-probability"),
    "text": (edit(token_logprobs=lambda told: ["-1"] * len(told)), "something else than a log-probability"),
    "NaN": (edit(token_logprobs=lambda told: [math.nan] * len(told)), "something else than a log-probability"),
    "no lists": (edit(top_logprobs=lambda told: [3] * len(told)), "something else than a log-probability"),
    "names": (edit(tokens=lambda told: [5] * len(told)), "something else than a log-probability"),
    "minus infinity": (edit(token_logprobs=lambda told: [-math.inf] * len(told)), "numbers from -100,000 to 0"),
    "absurdly low": (edit(token_logprobs=lambda told: [-1e6] * len(told)), "something else than a log-probability"),
    "hundreds of digits": (
        edit(token_logprobs=lambda told: [-(10**400)] * len(told)),
        "something else than a log-prob",
    ),
    "low alternatives": (
        edit(top_logprobs=lambda told: [row and dict.fromkeys(row, -(10**400)) for row in told]),
        "something else than a log-probability",
    ),
    "NaN among alternatives": (
        edit(top_logprobs=lambda told: [row and dict.fromkeys(row, math.nan) for row in told]),
        "something else than a log-probability",
    ),
    "equal indices": (numbered(0), "numbers its choices otherwise than from 0 on"),
    "an index far away": (numbered(10**400), "numbers its choices otherwise than from 0 on"),
    "an index of another type": (numbered(True), "numbers its choices otherwise than from 0 on"),
    "an id of many digits": (
        edit(tokens=lambda told: ["token_id:" + "9" * 5000] * len(told)),
        "calls token 0 of a window 'token_id:9999",
    ),
    "deep nesting": (lambda answer: b"[" * 100_000, "something else than JSON"),
    "logits": (edit(token_logprobs=lambda told: [5.0] * len(told)), "something else than a log-probability"),
    "sums": (
        edit(top_logprobs=lambda told: [None, *({name: -0.1 for name in row} for row in told[1:])]),
        "add up to more than 1",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_cannot_be_used(server, lm, name):
    server.change, expected = ANSWERS[name]
    with pytest.raises(EndpointError, match=expected) as caught:
        scored(box_of(server, lm))
    assert str(caught.value).startswith(server.url)
    assert len(str(caught.value)) < 500


def test_what_is_above_0_by_rounding_is_0(server, lm):
    """The likeliest token has all of the probability, and a little more."""

    def rounded(answer):
        for choice in answer["choices"]:
            told = choice["logprobs"]
            for row in told["top_logprobs"][1:]:
                row |= {name: 0.0009 if log_prob == max(row.values()) else -9999.0 for name, log_prob in row.items()}
            pairs = zip(told["top_logprobs"][1:], told["tokens"][1:], strict=True)
            told["token_logprobs"][1:] = [row[token] for row, token in pairs]
        return answer

    server.change = rounded
    log_probs, _, belief = scored(box_of(server, lm))
    assert (belief.confidence == 0).all()
    assert (belief.entropy == 0).all()
    assert ((log_probs == 0) | (log_probs == -9999)).all()


def test_choices_without_an_index_are_in_order(server, lm):
    def unnumbered(answer):
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return {"choices": [{name: item for name, item in choice.items() if name != "index"} for choice in choices]}

    server.change = unnumbered
    assert torch.allclose(scored(box_of(server, lm))[0], scored(lm)[0], atol=1e-4)


def test_an_answer_without_an_end_is_not_read(server, lm, monkeypatch):
    monkeypatch.setattr("memlm.models._endpoint._LONGEST_ANSWER", 1000)
    with pytest.raises(EndpointError, match="answers more than 1,000 bytes; check the URL"):
        scored(box_of(server, lm))


@pytest.mark.parametrize("names", ["ids", "vocabulary", "decoded"])
def test_fewer_alternatives_than_asked_for_are_refused(server, lm, names):
    """With the target added to them, its presence would show in the entropy."""
    server.names, server.limit = names, 5
    with pytest.raises(EndpointError, match=r"log-probabilities a token where 20 were asked for; lower top"):
        scored(box_of(server, lm))
    assert len(scored(box_of(server, lm, top=5))[0])


def test_another_tokenizer_is_noticed(lm):
    with serving(lm.model, tiny_tokenizer("reversed")) as server:
        server.names = "vocabulary"
        with pytest.raises(EndpointError, match="expected a model with the same tokenizer"):
            scored(box_of(server, lm))


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, {"error": {"message": "logprobs 20 is too many"}}, r"400 \(logprobs 20 is too many\); it must take"),
        (401, {"error": {"message": f"bad key {SECRET}"}}, r"401 \(bad key \*\*\*\); set OPENAI_API_KEY"),
        (404, {"object": "error", "message": "no model served"}, r"404 \(no model served\); check the model's name"),
        (422, {"detail": [{"msg": "prompt"}]}, r"422 .*prompt"),
        (418, b"", r"418 \(I'm a Teapot\)"),
        (400, b"\x1b[31mred\n" * 200, r"400 \(�\[31mred"),
        (302, b"", r"answers 302 "),
        (400, b"[" * 60_000, r"answers 400 \(\["),
    ],
)
def test_refusals_are_told_at_once(server, lm, status, body, expected):
    server.refusals = [(status, {"Location": "http://127.0.0.1:9/"}, body)]
    with pytest.raises(EndpointError, match=expected) as caught:
        scored(box_of(server, lm, api_key=SECRET))
    assert len(server.requests) == 1
    assert SECRET not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, lm, status):
    server.refusals = [(status, {"Retry-After": "0"}, {"error": "busy"})]
    assert torch.allclose(scored(box_of(server, lm))[0], scored(lm)[0], atol=1e-4)
    assert server.requests[0] == server.requests[1]


def test_in_the_end_it_gives_up(server, lm):
    server.refusals = [(503, {}, {"error": {"message": "loading"}})] * 9
    with pytest.raises(EndpointError, match=r"503 \(loading\); tried 3 times; try again later"):
        scored(box_of(server, lm, retries=2))
    assert len(server.requests) == 3


def test_a_slow_server(server, lm):
    server.delays = [0.5]
    assert len(scored(box_of(server, lm, timeout=0.25))[0])
    server.delays = [0.5] * 2
    with pytest.raises(EndpointError, match=r"no answer in 0.1 seconds\); tried 1 times"):
        scored(box_of(server, lm, timeout=0.1, retries=0))


def test_no_server(lm):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(
            EndpointError, match=r"cannot be reached \(.*refused\); tried 1 times; check that the server"
        ):
            scored(BlackBox(url, "served", lm, api_key=SECRET))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "file:///etc/passwd",
        "http://",
        f"http://me:{SECRET}@host/v1",
        f"http://host/v1?key={SECRET}",
        "http://host:port/v1",
        "http://[1/v1",
        "http://[",
        "http://a b/",
        "http://a..b/v1",
        "http://.",
        f"http://{'a' * 64}.org/v1",
        "http://münchen.de/v1",
        "http://日本/v1",
        "http://host/straße",
        "http://host/v 1",
        "http://ho\nst/v1",
        "http://host/v1\r\nX: y",
        "http://host\x00/v1",
        "http://host:99999/v1",
        "http://host:-1/v1",
        "http://a<b>/v1",
        "http://*/v1",
    ],
)
def test_urls_that_cannot_be_used(lm, url):
    with pytest.raises(ConfigError, match="the endpoint's URL is not of the form") as caught:
        BlackBox(url, "served", lm)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/v1/",
        "https://a-b_c.example.org",
        "http://10.0.0.1:80/",
        "http://[::1]:80/v1",
        "http://xn--mnchen-3ya.de/v1",
    ],
)
def test_urls_that_can(lm, url):
    assert BlackBox(url, "served", lm).endpoint.url == url.rstrip("/")


@pytest.mark.parametrize(
    "settings",
    [
        {"top": 0},
        {"top": math.nan},
        {"top": 2.5},
        {"top": True},
        {"top": 1 << 21},
        {"timeout": 0},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"retries": -1},
        {"retries": math.nan},
        {"retries": math.inf},
        {"api_key": f"{SECRET}\nHost: x"},
    ],
)
def test_settings_that_cannot_work(lm, settings):
    with pytest.raises(ConfigError) as caught:
        BlackBox("http://127.0.0.1/v1", "served", lm, **settings)
    assert SECRET not in str(caught.value)


def test_the_key_is_shown_nowhere(server, lm, monkeypatch, memory):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    box = box_of(server, lm)
    result = evaluate(box, documents(NEW), memory, KNN, show_progress=False)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in repr(box) + str(box.identity) + json.dumps(result.to_dict())
    server.change = lambda answer: f"not JSON: {SECRET}".encode()
    with pytest.raises(EndpointError) as caught:
        scored(box)
    assert SECRET not in str(caught.value)


# The command line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def endpoint(world):
    """The options that take another model than the encoder."""
    with serving(tiny_model("gpt2", seed=3), tiny_tokenizer()) as server:
        yield server, ("--endpoint", server.url, "--endpoint-model", "served")


def test_the_command_line_end_to_end(world, endpoint, tmp_path):
    server, options = endpoint
    saved, page = tmp_path / "settings.json", tmp_path / "page.html"
    tuned = run(
        *("tune", world.model, world.memory, world.texts / "valid", *options, "--mixture", "adapter", "--save", saved),
        *("--top-logprobs", "10", "--json"),
    )
    assert tuned.code == 0, tuned.err
    assert {request["logprobs"] for request in server.requests} == {10}
    result = run("eval", world.model, world.memory, world.texts / "test", "--mixture", saved, *options, "--json")
    assert result.code == 0, result.err
    alone, _ = json.loads(result.out)["results"]
    plain = run("eval", world.model, world.memory, world.texts / "test", "--mixture", saved, "--json")
    assert abs(alone["perplexity"] / json.loads(plain.out)["results"][0]["perplexity"] - 1) > 0.01
    explained = run("explain", world.model, world.memory, "The cat.", "--mixture", saved, *options, "--html", page)
    assert explained.code == 0, explained.err
    assert "served" in page.read_text()
    memory = Datastore(world.memory)
    encoder = lm_of("llama", **memory.manifest.windows)
    direct = evaluate(BlackBox(server.url, "served", encoder), world.texts / "test", memory, KNN, show_progress=False)
    assert direct.results[0].perplexity == pytest.approx(alone["perplexity"], rel=1e-4)


def test_the_command_line_says_in_one_line_what_is_wrong(world, endpoint, monkeypatch):
    server, options = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    command = ("eval", world.model, world.memory, world.texts / "test", "--lambda", "0.5", "--temperature", "10")
    server.refusals = [(401, {}, {"error": {"message": f"{SECRET} is unknown"}})] * 2
    for verb in (command, ("explain", world.model, world.memory, "The cat.", *command[4:])):
        line = refused(*verb, *options)
        assert "answers 401 (*** is unknown); set OPENAI_API_KEY" in line
        assert SECRET not in line
    assert "come together" in refused(*command, "--endpoint", server.url)
    assert "come together" in refused(*command, "--endpoint-model", "served")
    for url in ("nowhere", "http://[", "http://a b/", f"http://{'a' * 64}/"):
        assert "not of the form" in refused(*command, "--endpoint", url, "--endpoint-model", "served")
