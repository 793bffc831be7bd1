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
    """Run a plain forward of one sequence; return log p_LM, (n, vocabulary), and keys at every position, float64."""
    seen = []
    module = model.get_submodule(site.path)
    hook = module.register_forward_hook(lambda _, *passed: seen.extend(passed), with_kwargs=True)
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(ids)[None]).logits[0].double().numpy()
    hook.remove()
    args, kwargs, output = seen
    keys = [*args, *kwargs.values()][0] if site.tensor == "input" else output.last_hidden_state
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), keys.reshape(len(ids), -1).double().numpy()


def knn_lm(lm_log_probs, queries, keys, values, mixture):
    """Return log p, (n, vocabulary), and where the k-th and the next neighbor cannot be told apart."""
    distances = np.square(queries[:, None] - keys).sum(axis=2)
    order, nearest = distances.argsort(axis=1)[:, : mixture.k], np.sort(distances, axis=1)
    shares = np.exp((nearest[:, :1] - nearest[:, : mixture.k]) / mixture.temperature)
    p_knn, weight = np.zeros_like(lm_log_probs), mixture.interpolation_weight
    np.add.at(p_knn, (np.arange(len(p_knn))[:, None], values[order]), shares / shares.sum(axis=1, keepdims=True))
    beyond = np.pad(nearest, ((0, 0), (0, 1)), constant_values=np.inf)[:, mixture.k]
    return np.log(weight * p_knn + (1 - weight) * np.exp(lm_log_probs)), beyond < 1.0001 * nearest[:, mixture.k - 1]
