"""Training with neighbors' next tokens: the loss, and what comes with a batch; runs are in test_train_spalm.py."""

import numpy as np
import pytest
import torch

from memlm import Datastore, Document
from memlm.errors import ConfigError, ModelError
from memlm.training import (
    SpalmLoss,
    add_spalm_gate,
    neighbor_tokens,
    spalm_segments,
)
from tiny_memories import lm_of
from tiny_models import tiny_model


def batch_of(rows, length=7, k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (rows, length), generator=generator)
    neighbors = torch.randint(-1, 40, (rows, length, k), generator=generator)
    neighbors[0, 2] = -1  # a position that found nothing
    labels = ids.clone()
    labels[1, 4:] = -100
    return {"input_ids": ids, "labels": labels, "neighbors": neighbors}


def opened(family="llama", gates="scalar"):
    model = tiny_model(family)
    gate = add_spalm_gate(model, gates=gates)
    with torch.no_grad():
        for part in (gate.weight, gate.bias):
            part.copy_(0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
        gate.log_size.fill_(0.7)
    return model, gate


@pytest.mark.parametrize("gates", ["scalar", "vector"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_the_loss_is_the_equation_in_float64(family, gates):
    model, gate = opened(family, gates)
    batch = batch_of(2)
    with torch.no_grad():
        loss = SpalmLoss()(model, batch, update=0, updates=1)
        hidden = model.base_model(batch["input_ids"]).last_hidden_state.double().numpy()
    head = model.get_output_embeddings()
    weight = head.weight.detach().double().numpy()
    bias = 0.0 if getattr(head, "bias", None) is None else head.bias.detach().double().numpy()
    G, c = gate.weight.detach().double().numpy(), gate.bias.detach().double().numpy()
    total, count = 0.0, 0
    for row in range(2):
        for place in range(6):
            target = int(batch["labels"][row, place + 1])
            if target == -100:
                continue
            h = hidden[row, place]
            near = batch["neighbors"][row, place].numpy()
            z = h
            if (near >= 0).any():
                e = weight[near[near >= 0]]
                a = np.exp(e @ h - (e @ h).max())
                g = 1 / (1 + np.exp(-(G @ h + c)))
                z = (1 - g) * np.exp(0.7) * ((a / a.sum()) @ e) + g * h
            logits = weight @ z + bias
            top = logits.max()
            total -= logits[target] - top - np.log(np.exp(logits - top).sum())
            count += 1
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


def test_gradients_reach_the_model_its_embeddings_and_the_gate():
    model, gate = opened()
    SpalmLoss()(model, batch_of(2), update=0, updates=1).backward()
    for part in (gate.weight, gate.bias, gate.log_size, model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight):
        assert part.grad is not None
        assert bool((part.grad != 0).any())


def test_without_neighbors_it_is_cross_entropy():
    model, _ = opened()
    batch = batch_of(2)
    batch["neighbors"] = torch.full((2, 7, 3), -1)
    found = SpalmLoss().log_probs(model, batch)
    expected = model(batch["input_ids"], labels=batch["labels"]).loss
    assert (-found.with_memory.mean()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.without_memory.allclose(found.with_memory, atol=1e-5)
    # the control: with neighbors it is something else
    found = SpalmLoss().log_probs(model, batch_of(2))
    assert (found.with_memory - found.without_memory).abs().max() > 0.01


def test_a_model_without_a_gate_and_a_gate_without_a_kind_are_refused():
    with pytest.raises(ModelError, match="has no gate; give it one by add_spalm_gate"):
        SpalmLoss()(tiny_model("llama"), batch_of(2), update=0, updates=1)
    with pytest.raises(ConfigError, match="gates is 'both'; expected 'scalar', or 'vector'"):
        add_spalm_gate(tiny_model("llama"), gates="both")
    with pytest.raises(ModelError, match="scales or caps its logits"):
        add_spalm_gate(tiny_model("gemma2"))
    with pytest.raises(ConfigError, match="carry is -1"):
        SpalmLoss(-1)


def test_carried_tokens_are_seen_without_gradient():
    """A segment behind its context is scored as the whole is; a row that has none sees none."""
    model, _ = opened()
    whole = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(3))
    neighbors = torch.randint(0, 40, (2, 12, 3), generator=torch.Generator().manual_seed(4))
    context = torch.zeros(2, 6, dtype=torch.long)
    context[0, :5] = whole[0, :5]
    batch = {"input_ids": whole[:, 5:], "labels": whole[:, 5:], "neighbors": neighbors[:, 5:]}
    behind = batch | {"context": context, "context_tokens": torch.tensor([5, 0])}
    loss = SpalmLoss(carry=6)
    found = loss.log_probs(model, behind).with_memory.view(2, 6)
    full = SpalmLoss().log_probs(model, {"input_ids": whole, "labels": whole, "neighbors": neighbors}).with_memory
    alone = SpalmLoss().log_probs(model, batch).with_memory.view(2, 6)
    assert found[0].allclose(full.view(2, 11)[0, 5:], atol=1e-4)
    assert found[1].allclose(alone[1], atol=1e-4)
    assert not found[0].allclose(alone[0], atol=1e-3)
    # keys and values of the context are constants: its embeddings get no gradient
    only = {name: value[:1] for name, value in behind.items()}
    only["context"], only["input_ids"] = torch.full((1, 6), 41), only["input_ids"]
    model.zero_grad()
    loss(model, only, update=0, updates=1).backward()
    assert (
        not model.get_input_embeddings().weight.grad[41].any()
        or model.lm_head.weight is model.model.embed_tokens.weight
    )


def test_neighbors_come_with_their_positions(tmp_path):
    lm = lm_of("llama")
    texts = ["the cat was in the house", "x", "the cat was on the roof of the house and sang"]
    memory = Datastore.build(
        lm, [Document(id=str(n), text=text) for n, text in enumerate(texts)], tmp_path / "s", show_progress=False
    )
    ids = [lm.tokenize(Document(id="", text=text)).ids for text in texts]
    found = neighbor_tokens(lm, ids, texts, memory, 3, show_progress=False)
    assert found.shape == (sum(len(item) - 1 for item in ids), 3)
    own = neighbor_tokens(lm, ids, texts, memory, 3, own_document=True, show_progress=False)
    targets = np.concatenate([item[1:] for item in ids])
    # a stored token is its own nearest neighbor; where two texts begin alike, it may be the other's
    assert (own == targets[:, None]).any(axis=1).all()
    assert (found == targets[:, None]).any(axis=1).mean() < 0.9
    segments = spalm_segments(ids, own, 5, streams=2, carry=3)
    seen = 0
    for index in range(len(segments)):
        row = segments[index]
        for place in range(4):
            if row["labels"][place + 1] != -100:
                assert row["labels"][place + 1] in row["neighbors"][place]
                seen += 1
            else:
                assert (row["neighbors"][place] == -1).all()
        if row["document"] >= 0:
            start = row["position"]
            before = ids[row["document"]][max(0, start - 3) : start]
            assert row["context_tokens"] == len(before)
            assert (row["context"][: len(before)] == before).all()
    assert seen == len(targets)


def test_what_a_loss_is_divided_by():
    model, _ = opened()
    batch = batch_of(2)
    with torch.no_grad():
        own, given = (SpalmLoss()(model, batch, update=0, updates=1, targets=targets) for targets in (None, 36))
    assert float(given) == pytest.approx(float(own) * 9 / 36, rel=1e-5)


def test_padding_behind_the_text_takes_no_position():
    model, _ = opened("gpt2")
    limit = model.config.n_positions
    ids = torch.randint(1, 40, (1, limit - 2), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 5:] = -100
    neighbors = torch.full((1, limit - 2, 2), -1)
    batch = {"input_ids": ids, "labels": labels, "neighbors": neighbors}
    behind = batch | {"context": ids[:, :40], "context_tokens": torch.tensor([40])}
    found = SpalmLoss(carry=40).log_probs(model, behind).with_memory
    assert found.shape == (4,)
    whole = torch.cat([ids[:, :40], ids[:, :5]], dim=1)
    with torch.no_grad():
        expected = model(whole).logits.log_softmax(dim=-1)[0, 40:44].gather(1, whole[0, 41:, None])[:, 0]
    assert found.allclose(expected, atol=1e-4)


def test_a_loss_serves_one_model_after_the_other():
    loss, whole = SpalmLoss(carry=3), {name: part[:1] for name, part in batch_of(2).items()}
    batch = whole | {"context": torch.tensor([[1, 2, 3]]), "context_tokens": torch.tensor([3])}
    for seed in (0, 1):
        model = tiny_model("llama", seed)
        add_spalm_gate(model)
        assert loss.log_probs(model, batch).with_memory.equal(SpalmLoss(carry=3).log_probs(model, batch).with_memory)
