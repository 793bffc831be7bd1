"""Windows: every target once, aligned, bounded inputs, documents apart, one policy for first and last tokens."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import Document
from memlm.errors import ConfigError, ModelError
from memlm.models import LanguageModel
from memlm.models._windows import WindowScheme, batch_windows, tokenize
from tiny_models import END_OF_TEXT_ID, FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer

lengths = st.lists(st.integers(0, 40), max_size=8)
sizes = st.integers(1, 12)


@cache
def model_of(family):
    return tiny_model(family)


def random_sequences(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(VOCAB_SIZE, size=length) for length in lengths]


@settings(deadline=None)
@given(st.integers(0, 200), sizes, sizes)
def test_every_target_is_scored_once_from_bounded_inputs(length, context, stride):
    targets = []
    for start, first, stop in WindowScheme(context, stride).windows(length):
        assert 0 <= start < first < stop <= length
        assert stop - 1 - start <= context + stride - 1
        assert first - start == min(context, first), "all the left context there is, up to `context`"
        targets += range(first, stop)
    assert targets == list(range(1, length))


@settings(deadline=None)
@given(lengths, sizes, sizes, st.integers(1, 100))
def test_batches_are_aligned_and_never_mix_documents(lengths, context, stride, tokens):
    # A token's id says which document it is of and where it stands there.
    sequences = [1000 * (number + 1) + np.arange(length) for number, length in enumerate(lengths)]
    row_of = [token for ids in sequences for token in ids[1:]]  # the targets, in order
    seen = []
    for batch in batch_windows(sequences, WindowScheme(context, stride), tokens):
        height, width = batch.input_ids.shape
        assert width <= context + stride - 1
        assert height == 1 or height * width <= tokens
        assert batch.scored.shape == (height, width)
        last_seen = batch.input_ids[batch.scored]  # the token right before each target
        assert torch.equal(last_seen + 1, batch.targets)
        assert [row_of[row] for row in batch.rows] == batch.targets.tolist()
        for line in batch.input_ids:
            inputs = line[line > 0]  # without padding
            assert torch.equal(inputs, torch.arange(int(inputs[0]), int(inputs[0]) + len(inputs)))
            assert not line[len(inputs) :].any(), "padding is at the right"
        assert not batch.input_ids[batch.scored].eq(0).any(), "padding is not scored"
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(len(row_of)))


def test_widths_are_batched_together():
    sequences = random_sequences([30, 3, 30, 3])
    shapes = [tuple(batch.input_ids.shape) for batch in batch_windows(sequences, WindowScheme(64, 64), 60)]
    assert shapes == [(2, 29), (2, 2)]


@pytest.mark.parametrize(("context", "stride"), [(0, 4), (4, 0), (-1, 4)])
def test_bad_scheme(context, stride):
    with pytest.raises(ConfigError, match=f"context {context} and stride {stride}"):
        WindowScheme(context, stride)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), sizes, sizes, st.integers(1, 200))
@pytest.mark.parametrize("family", ["gpt2", "bloom", "mistral", "gemma2", "mixtral"])
def test_batching_does_not_change_the_numbers(family, lengths, context, stride, batch_tokens):
    sequences = random_sequences(lengths, sum(lengths))
    collected = []
    for tokens in (1, batch_tokens):  # one window at a time, and with padding
        lm = LanguageModel(
            model_of(family), tiny_tokenizer(), family, context=context, stride=stride, batch_tokens=tokens
        )
        batches = list(lm.score(sequences))
        order = torch.cat([batch.rows for batch in batches]).argsort()
        pairs = list(lm.keys(sequences))
        key_order = torch.cat([rows for rows, _ in pairs]).argsort()
        collected.append(
            (
                torch.cat([batch.log_probs for batch in batches])[order],
                torch.cat([batch.keys for batch in batches])[order],
                torch.cat([keys for _, keys in pairs])[key_order],
            )
        )
    (log_probs, keys, built), (other_log_probs, other_keys, other_built) = collected
    assert torch.allclose(log_probs, other_log_probs, atol=1e-5, rtol=1e-5)
    for others in (other_keys, built, other_built):
        assert torch.allclose(keys, others, atol=1e-4, rtol=1e-4), "what is stored is what is looked up"


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_of_a_plain_forward_of_the_window(family):
    lm = LanguageModel(model_of(family), tiny_tokenizer(), family, context=5, stride=7, batch_tokens=64)
    sequences = random_sequences([23, 1, 9])
    keys = torch.full((22 + 8, lm.key_width), torch.nan)
    for rows, part in lm.keys(sequences):
        keys[rows] = part
    module, seen = lm.model.get_submodule(lm.site.path), []
    into = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    out = module.register_forward_hook(lambda _, args, output: seen.append(output))
    row = 0
    for ids in (sequences[0], sequences[2]):
        for target in range(1, len(ids)):
            first = 1 + 7 * ((target - 1) // 7)  # of the target's window
            seen.clear()
            with torch.no_grad():
                lm.model(torch.from_numpy(ids[max(0, first - 5) : target])[None])
            found = seen[0] if lm.site.tensor == "input" else seen[1].last_hidden_state
            assert torch.allclose(found.reshape(-1, lm.key_width)[-1], keys[row], atol=1e-4, rtol=1e-4)
            row += 1
    into.remove(), out.remove()


@pytest.mark.parametrize(
    ("bos", "eos", "before", "after"),
    [
        ("<|endoftext|>", "<|endoftext|>", [END_OF_TEXT_ID], [END_OF_TEXT_ID]),
        ("<|endoftext|>", None, [END_OF_TEXT_ID], []),
        (None, "<|endoftext|>", [], [END_OF_TEXT_ID]),
        (None, None, [], []),
    ],
)
def test_first_and_last_token_of_a_document(bos, eos, before, after):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    text = "the house — and ünder"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids, spans = tokenize(tokenizer, Document(id="a", text=text))[1:]
    assert ids.tolist() == [*before, *plain, *after]
    assert ids.dtype == np.int64
    assert len(spans) == len(ids)
    assert spans[0].tolist() == ([0, 0] if before else [0, 1])
    assert not after or spans[-1].tolist() == [len(text)] * 2
    lm = LanguageModel(model_of("llama"), tokenizer, "llama")
    targets = torch.cat([batch.targets for batch in lm.score([ids])])
    assert targets.tolist() == [*before, *plain, *after][1:], "everything but the first place is scored"


def test_empty_text():
    tokenizer = tiny_tokenizer()
    ids, spans = tokenize(tokenizer, Document(id="a", text=""))[1:]
    assert (ids.tolist(), spans.tolist()) == ([END_OF_TEXT_ID] * 2, [[0, 0]] * 2)
    tokenizer.bos_token = tokenizer.eos_token = None
    ids, spans = tokenize(tokenizer, Document(id="a", text=""))[1:]
    assert (ids.shape, spans.shape) == ((0,), (0, 2))
    assert list(LanguageModel(model_of("llama"), tokenizer, "llama").score([ids])) == []


def test_slow_tokenizer_is_refused():
    with pytest.raises(ModelError, match="fast tokenizer"):
        tokenize(object(), Document(id="a", text="x"))


def test_windows_longer_than_the_positions_are_refused():
    model = model_of("gpt2")
    assert LanguageModel(model, tiny_tokenizer(), "tiny").windows == WindowScheme(32, 96)
    assert LanguageModel(model, tiny_tokenizer(), "tiny", context=100, stride=29).windows == WindowScheme(100, 29)
    with pytest.raises(ModelError, match=r"context 100 . stride 30 is longer than the 128 positions of tiny"):
        LanguageModel(model, tiny_tokenizer(), "tiny", context=100, stride=30)


def test_models_without_a_limit_get_a_sane_one():
    assert LanguageModel(model_of("bloom"), tiny_tokenizer(), "bloom").windows == WindowScheme(256, 768)
    assert LanguageModel(model_of("mpt"), tiny_tokenizer(), "mpt").windows == WindowScheme(32, 96)
