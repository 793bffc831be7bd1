"""Attention with memory by brute force in float64 NumPy, for a Llama layer. It shares no code with memlm."""

import numpy as np


def array(tensor):
    return tensor.detach().double().numpy()


def rotated(vectors, positions):
    """Rotary positions of Llama, θ = 10,000; vectors of shape (…, d), positions of shape (…)."""
    half = vectors.shape[-1] // 2
    angles = np.asarray(positions)[..., None] * 10000.0 ** (-np.arange(half) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Layer:
    """One attention layer of a Llama with memory, for one text, segment after segment."""

    def __init__(self, attention, settings, memory):
        config = attention.config
        self.heads, self.d = config.num_attention_heads, attention.head_dim
        self.groups = self.heads // config.num_key_value_heads
        names = "q_proj", "k_proj", "v_proj", "o_proj"
        self.q, self.k, self.v, self.o = (array(getattr(attention, name).weight) for name in names)
        self.settings = settings
        self.learned = {name: array(tensor) for name, tensor in memory.named_parameters()}
        self.keys = np.zeros((0, config.num_key_value_heads, self.d))
        self.values = self.keys.copy()

    def forward(self, hidden):
        """Return the layer's output for hidden states, (tokens, width), and remember them."""
        n = len(hidden)
        queries, keys, values = ((hidden @ weight.T).reshape(n, -1, self.d) for weight in (self.q, self.k, self.v))
        scale = np.full(self.heads, self.d**-0.5)
        own = queries
        if self.settings.projections == "own_queries":
            own = queries + (hidden @ self.learned["query.weight"].T).reshape(n, self.heads, self.d)
        if self.settings.normalize == "l2":
            queries, keys, own, scale = unit(queries), unit(keys), unit(own), self.learned["scale"]
        out = np.zeros((n, self.heads, self.d))
        for t in range(n):
            for h in range(self.heads):
                g = h // self.groups
                scores = scale[h] * rotated(keys[: t + 1, g], np.arange(t + 1)) @ rotated(queries[t, h], t)
                local = np.exp(scores - scores.max())
                out[t, h] = local @ values[: t + 1, g] / local.sum()
                if len(self.keys):
                    weight, found = self.recall(own[t, h], h, g, t, scale[h], np.log(local.sum()) + scores.max())
                    out[t, h] = (1 - weight) * out[t, h] + weight * found
        size = self.settings.size
        self.keys = np.concatenate([self.keys, keys])[-size:]
        self.values = np.concatenate([self.values, values])[-size:]
        return out.reshape(n, -1) @ self.o.T

    def recall(self, query, h, g, t, scale, local_mass):
        keys, ages = self.keys[:, g], len(self.keys) - np.arange(len(self.keys)) + t
        rule, k = self.settings.positions, self.settings.top_k
        placed = query if rule == "none" else rotated(query, t + (k if rule == "rebased" else 0))
        fading = np.exp(self.learned["forgetting"][h]) if self.settings.drop_off == "age" else 0.0
        found = scale * keys @ (query if rule == "rebased" else placed) - fading * ages
        best = np.sort(np.argsort(-found)[:k])
        keys = keys[best]
        if rule == "rebased":
            keys = rotated(keys, np.arange(k - len(best), k))
        scores = scale * keys @ placed - fading * ages[best]
        shares = np.exp(scores)
        mass = np.log(shares.sum())
        other = {"joint": local_mass, "gate": None, "null_slot": self.learned.get("null", np.zeros(h + 1))[h]}
        if self.settings.combine == "gate":
            weight = sigmoid(self.learned["gate"][h])
        else:
            weight = sigmoid(mass - other[self.settings.combine])
        return weight, shares @ self.values[best, g] / shares.sum()
