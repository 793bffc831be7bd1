"""kNN-LM by brute force in float64 NumPy. It shares no code with memlm: whatever they agree on is right twice."""

import numpy as np
import torch
from safetensors.torch import load_file


def stored_entries(folder):
    """Read all keys (float64) and values of a datastore from its files."""
    segments = sorted((folder / "segments").iterdir())
    keys = [load_file(segment / "keys.safetensors")["keys"].double().numpy() for segment in segments]
    values = [load_file(segment / "entries.safetensors")["values"].numpy().astype(int) for segment in segments]
    return np.concatenate(keys), np.concatenate(values)


def teacher_forced(model, site, ids):
    """Run a plain forward of one sequence; return log p_LM and keys at every position, float64."""
    seen = []
    module = model.get_submodule(site.path)
    into = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    out = module.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(ids)[None]).logits[0].double().numpy()
    into.remove(), out.remove()
    keys = seen[0] if site.tensor == "input" else seen[1].last_hidden_state
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), keys.reshape(len(ids), -1).double().numpy()


def knn(queries, keys, values, k, temperature, vocab_size):
    """Return p_kNN of every query, (n, vocab_size), and where the k-th and the next neighbor cannot be told apart."""
    distances = np.square(queries[:, None] - keys[None]).sum(axis=2)
    order, near = distances.argsort(axis=1)[:, :k], np.sort(distances, axis=1)
    weights = np.exp((near[:, :1] - near[:, :k]) / temperature)
    probabilities = np.zeros((len(queries), vocab_size))
    np.add.at(
        probabilities, (np.arange(len(queries))[:, None], values[order]), weights / weights.sum(axis=1, keepdims=True)
    )
    return probabilities, near[:, k] - near[:, k - 1] < 1e-4 * near[:, k] if k < len(keys) else np.zeros(
        len(queries), bool
    )
