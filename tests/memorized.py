"""Text, and what a model makes of it, for tests of attention memory."""

import torch

# attention of their own, sinks, or layers without rotary positions that do not say so
REFUSED = {"gpt_neo", "gptj", "bloom", "mpt", "falcon", "falcon_sequential", "gpt_oss", "cohere2"}
SOME = ("llama", "gpt2", "gpt_neox", "qwen2", "qwen3")


def text(rows=2, tokens=12, seed=0):
    return torch.randint(0, 200, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits
