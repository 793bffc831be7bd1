"""Key sites: where in a model the keys are read.

The default is the input of the last feed-forward layer, after its normalization (Khandelwal et al. 2020, table 5).
Where attention and feed-forward run in parallel that tensor has not seen the last attention, and the output of the
final norm is used instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitecture
from ._layers import FEED_FORWARD_NAMES, find_decoder, find_layers, path_of

LAST_FFN_INPUT = "last_ffn_input"
FINAL_NORM_OUTPUT = "final_norm_output"

# Named families: model_type → (name of the feed-forward module in a layer, is it parallel to attention?).
# "Parallel" is a bool or the config field that says so.
_FAMILIES: dict[str, tuple[str, bool | str]] = {
    "bloom": ("mlp", False),
    "codegen": ("mlp", True),
    "cohere": ("mlp", True),
    "cohere2": ("mlp", True),
    "falcon": ("mlp", "parallel_attn"),
    "gemma": ("mlp", False),
    "gemma2": ("mlp", False),
    "gemma3_text": ("mlp", False),
    "gpt2": ("mlp", False),
    "gpt_neo": ("mlp", False),
    "gpt_neox": ("mlp", "use_parallel_residual"),
    "gpt_oss": ("mlp", False),
    "gptj": ("mlp", True),
    "granite": ("mlp", False),
    "llama": ("mlp", False),
    "mistral": ("mlp", False),
    "mixtral": ("mlp", False),
    "mpt": ("ffn", False),
    "olmo": ("mlp", False),
    "olmo2": ("mlp", False),
    "olmo3": ("mlp", False),
    "opt": ("fc1", False),
    "phi": ("mlp", True),
    "phi3": ("mlp", False),
    "qwen2": ("mlp", False),
    "qwen3": ("mlp", False),
    "qwen3_moe": ("mlp", False),
    "smollm3": ("mlp", False),
    "stablelm": ("mlp", "use_parallel_residual"),
    "starcoder2": ("mlp", False),
}


@dataclass(frozen=True, slots=True)
class KeySite:
    """Where the keys are read.

    Attributes:
        name: `last_ffn_input`, `final_norm_output`, or the dotted path that the user gave.
        path: Dotted path of the module, from the top-level model.
        tensor: "input" or "output" of that module.
        note: Why this site, where it is not the default or was found by the structural rule; else "".
    """

    name: str
    path: str
    tensor: str
    note: str = ""


def find_key_site(model: Any, name: str | None = None) -> KeySite:
    """Find the key site of a causal language model.

    Args:
        model: A Hugging Face causal LM; a PEFT model is looked through.
        name: `last_ffn_input`, `final_norm_output`, a dotted path of a module (its input is the key; append ":output"
            for its output), or None for the family's default.

    Raises:
        UnsupportedArchitecture: There is no such module, or no feed-forward layer was found.
    """
    if name == FINAL_NORM_OUTPUT:
        return _final_norm_output(model, "")
    if name not in (None, LAST_FFN_INPUT):
        return _named(model, str(name))
    family = getattr(model.config, "model_type", "")
    feed_forward, parallel = _FAMILIES.get(family, (None, "use_parallel_residual"))
    if isinstance(parallel, str):
        parallel = bool(getattr(model.config, parallel, False))
    if family == "falcon" and getattr(model.config, "new_decoder_architecture", False):
        parallel = True
    if parallel and name is None:
        return _final_norm_output(
            model,
            f"attention and feed-forward run in parallel in {family}, so the feed-forward input has not seen the last "
            "attention: keys are the final norm's output",
        )
    note = "" if feed_forward else f"{family or 'this architecture'} is not in the table: found by its structure"
    return _last_ffn_input(model, feed_forward, note)


def _last_ffn_input(model: Any, feed_forward: str | None, note: str) -> KeySite:
    layers = find_layers(model)
    if layers is None:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has no list of layers; name the key site yourself, such as 'final_norm_output'"
        )
    layer = layers[-1]
    names = (feed_forward,) if feed_forward else (*FEED_FORWARD_NAMES, "fc1")
    for candidate in names:
        module = getattr(layer, candidate, None)
        if isinstance(module, nn.Module):
            return KeySite(LAST_FFN_INPUT, path_of(model, module), "input", note)
    raise UnsupportedArchitecture(
        f"no feed-forward module ({', '.join(names)}) in {path_of(model, layer)} of {type(model).__name__}; name "
        "the key site yourself: 'final_norm_output' or the dotted path of a module"
    )


def _final_norm_output(model: Any, note: str) -> KeySite:
    """The decoder's own output: what the output embedding sees."""
    return KeySite(FINAL_NORM_OUTPUT, path_of(model, find_decoder(model)), "output", note)


def _named(model: Any, name: str) -> KeySite:
    path, _, tensor = name.partition(":")
    if tensor not in ("", "input", "output"):
        raise UnsupportedArchitecture(f"key site {name!r} ends in {tensor!r}; expected ':input' or ':output'")
    try:
        model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has no module {path!r} for a key site; expected 'last_ffn_input', "
            "'final_norm_output' or a path that model.named_modules() lists"
        ) from error
    return KeySite(name, path, tensor or "input")
