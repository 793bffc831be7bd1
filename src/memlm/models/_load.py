"""Loading models: by hub name, from a folder, or the one that ships with memlm."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import ConfigError, ModelError
from ._language_model import LanguageModel

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: A folder made by `save_pretrained`, a name on the Hugging Face hub, or "reference" for the small model
            that ships with memlm.
        dtype: "float32", "bfloat16", "float16" or "auto" (as stored).
        device: "cpu", "cuda", … ; None means CUDA where there is one.
        revision: Of a hub model.
        trust_remote_code: Run code that a hub model brings along.
        **settings: Passed to `LanguageModel`: key_site, context, stride, batch_tokens.

    Raises:
        ModelError: There is no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if str(name) == "reference":
        return reference_lm(dtype=dtype, device=device, **settings)
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"device is {device!r}; expected cpu, or cuda where there is one ({reason})") from error
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(str(name)):
        raise ModelError(f"there is no folder {name}; expected one made by save_pretrained, or a name on the hub")
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise ModelError(f"{name} holds no config.json; expected a folder made by save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=_DTYPES[dtype],
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(" .:")
        raise ModelError(
            f"cannot load a causal language model from {str(name)!r}: {reason}. Expected a folder made by "
            "save_pretrained, the name of a model on the hub, or 'reference'"
        ) from error
    missing = sorted(loading["missing_keys"])  # transformers draws these at random and goes on
    if missing:
        raise ModelError(
            f"{str(name)!r} lacks {len(missing)} of the weights of a {type(model).__name__} "
            f"({', '.join(missing[:3])}); expected a causal language model saved with its head"
        )
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return LanguageModel(model, tokenizer, Path(name).name if Path(name).is_dir() else str(name), **settings)


def reference_lm(*, dtype: str = "float32", device: str | None = None, **settings: Any) -> LanguageModel:
    """Load the small language model that ships with memlm; its card lies beside its weights."""
    folder = resources.files("memlm") / "reference_lm"
    lm = load(Path(str(folder)), dtype=dtype, device=device, **settings)
    lm.name = "memlm-reference"
    return lm
