"""`memlm eval`: perplexity with and without the memory."""

from __future__ import annotations

from . import _common as common


def evaluate(
    model: common.Model,
    datastore: common.MemoryOrNone,
    text: common.Text,
    mixture: common.Mixture = None,
    weight: common.Weight = None,
    temperature: common.Temperature = None,
    k: common.K = None,
    max_tokens: common.MaxTokens = None,
    endpoint: common.Endpoint = None,
    endpoint_model: common.EndpointModel = None,
    top_logprobs: common.TopLogprobs = 20,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Score text by the model alone and with the memory: perplexity per token, word and byte, and tokens a second."""
    encoder, memory, settings = common.open_all(model, datastore, mixture, weight, temperature, k, dtype, device)
    lm = common.behind(endpoint, endpoint_model, top_logprobs, encoder)
    from ..evaluation import evaluate as measure

    result = measure(lm, [str(path) for path in text], memory, settings, max_tokens=max_tokens)
    common.emit(result.to_dict(), str(result), json)
