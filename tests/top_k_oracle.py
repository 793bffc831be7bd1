"""Top-k attention and feed-forward layers, dense, in float64: every score is there, and those not chosen are masked.

It shares no code with memlm; the gradient is torch's own, of the dense computation.
"""

import torch


def chosen_of(scores, k):
    """Return where the k largest of the last dimension are, by sorting."""
    order = scores.sort(dim=-1, descending=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, torch.ones_like(order, dtype=torch.bool))


def attention(queries, keys, values, k, scale=None, mask=None, causal=False, cap=None, sinks=None, kept=None):
    """Attend to the k best of all keys; `kept` multiplies the weights, shape (batch, heads, n, m)."""
    heads, m = queries.shape[1], keys.shape[2]
    keys, values = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (keys, values))
    scores = torch.einsum("bhnd,bhmd->bhnm", queries, keys) * (scale or queries.shape[-1] ** -0.5)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    hidden = torch.zeros(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        hidden |= ~mask
    elif mask is not None:
        scores = scores + mask
    if causal:
        hidden |= torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden | ~chosen_of(scores.detach().masked_fill(hidden, -torch.inf), k), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)[..., :m]
    return (weights if kept is None else weights * kept) @ values


def feed_forward(inputs, first, values, k, activation, factor=None, by="score"):
    """Use the k best of all hidden units."""
    scores = inputs @ first[0].T + (0 if first[1] is None else first[1])
    units = activation(scores)
    if factor is not None:
        units = units * (inputs @ factor[0].T + (0 if factor[1] is None else factor[1]))
    ranks = scores if by == "score" else units.abs()
    return (units * chosen_of(ranks.detach(), k)) @ values
