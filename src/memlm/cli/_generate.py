"""`memlm generate`: text written with the memory."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import _common as common


def generate(
    model: common.Model,
    datastore: common.MemoryOrNone,
    prompt: Annotated[str, typer.Argument(help="Beginning of the text.")],
    mixture: common.Mixture = None,
    weight: common.Weight = None,
    temperature: common.Temperature = None,
    k: common.K = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 60,
    sample: Annotated[bool, typer.Option(help="Draw tokens; otherwise take the likeliest.")] = False,
    top_p: Annotated[float, typer.Option(help="With --sample: draw from the likeliest tokens of this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the drawing.")] = 0,
    sources: Annotated[bool, typer.Option(help="Show where the text came from, at the end.")] = True,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Write text with the memory, token by token as it comes, and show its sources."""
    common.check_text("prompt", prompt)
    if not 0 < top_p <= 1:
        raise ConfigError(f"top-p is {top_p}; expected a share above 0 and up to 1")
    lm, memory, settings = common.open_all(model, datastore, mixture, weight, temperature, k, dtype, device)
    from ..evaluation import explain

    options: dict[str, Any] = {"do_sample": True, "top_p": top_p} if sample else {"do_sample": False}
    text = write(lm, memory, settings, prompt, max_new_tokens, seed, stream=not json, **options)
    explanation = explain(
        lm, text, memory, settings, title="Generated text", generated_from=len(prompt), leave_out_own=False
    )
    if json:
        common.emit({"text": text, "explanation": explanation.to_dict()}, "", True)
    elif sources:
        typer.echo()
        explanation.print()


def write(
    lm: Any, memory: Any, settings: Any, prompt: str, max_new_tokens: int, seed: int, *, stream: bool, **options: Any
) -> str:
    """Generate a continuation and return the whole text; with `stream`, print it to stdout as it comes."""
    import torch

    from ..models import attach
    from ._stream import PrintableStreamer

    ids = lm.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if lm.tokenizer.bos_token_id is not None:
        ids = [lm.tokenizer.bos_token_id, *ids]
    if len(ids) + max_new_tokens > lm.positions:
        raise ConfigError(
            f"{len(ids)} tokens of prompt and {max_new_tokens} new ones are more than the {lm.positions} positions of "
            f"{lm.name}; shorten one of them"
        )
    inputs = torch.tensor([ids], device=lm.device)
    if stream:
        options["streamer"] = PrintableStreamer(lm.tokenizer, skip_prompt=False, skip_special_tokens=True)
    torch.manual_seed(seed)
    with attach(lm.model, memory, settings):
        output = lm.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=lm.tokenizer.eos_token_id,
            **options,
        )
    # decoded as a whole and cut: some tokenizers drop the space at the beginning of what they decode
    whole, head = (lm.tokenizer.decode(part, skip_special_tokens=True) for part in (output[0], ids))
    return prompt + whole[len(head) :]
