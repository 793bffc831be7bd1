"""Train a causal LM and its gate from a recipe; every step can be interrupted and resumed."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import safe_open
from torch import Tensor

from ..datastore import Datastore
from ..documents import Corpus
from ..errors import ConfigError, DatastoreError
from ..files import atomic_writer, write_json
from ..models import CarriedCache, LanguageModel, load, output_embedding
from ._card import write_spalm_card
from ._run import check_recipe, file_names, published
from ._run_trainer import check_reports, check_texts, device_of, last_checkpoint, run_to_the_end
from ._spalm import GATE, SpalmLoss, add_spalm_gate
from ._spalm_data import SpalmSegments, neighbor_tokens, spalm_segments
from ._spalm_recipe import SpalmRecipe
from ._trime_data import documents_of


def train_spalm(
    recipe: SpalmRecipe, output: str | Path, *, device: str | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Train a model and its gate, or the gate alone, into `output`; continue where an earlier run was stopped.

    First the training text is stored, with the model as it is, and four neighbors are found for every token, without
    those of its own document. From there on nothing is searched.

    Args:
        recipe: Data, start, memory and schedule.
        output: Folder of the run: the datastore, neighbors, the last checkpoint, `losses.jsonl`, and at the end `model`
            and `spalm.json`, the gate.
        device: "cpu" or "cuda"; None means CUDA where there is one.
        show_progress: Show rate and time left on stderr.

    Returns:
        Steps, tokens, parameters, and for each validation text nats a token and perplexity with memory and without. The
        neighbors are those that the model at the start has found.

    Raises:
        ConfigError: A setting cannot work, the folder holds another run, or the loss is not finite.
        CorpusError: Text cannot be read.
        ModelError: The model cannot be loaded, or its logits are scaled or soft-capped.
    """
    output = Path(output)
    device = device_of(device, recipe.schedule.autocast)
    check_reports(recipe.schedule.report_to)
    check_texts([*recipe.train, *recipe.valid])
    check_recipe(recipe.describe(), recipe.fixed(), output)
    start = load(recipe.from_, device=device)
    if recipe.batches.length > start.positions:
        raise ConfigError(
            f"length = {recipe.batches.length} is longer than the {start.positions} positions of {start.name}"
        )
    _check_carry(recipe, start)
    output_embedding(start.model)  # refuses a model before anything is written
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "recipe.json", recipe.describe())
    memory = _stored(recipe, start, output, show_progress)
    train = _segments(recipe, start, memory, recipe.train, output / "train", None, show_progress)
    limit = recipe.schedule.valid_tokens
    valid = {
        name: _segments(recipe, start, memory, [path], output / f"valid-{number}", limit, show_progress)
        for number, (name, path) in enumerate(zip(file_names(recipe.valid), recipe.valid, strict=True))
    }
    checkpoint = last_checkpoint(output)
    lm = start if checkpoint is None else load(checkpoint, device=device)
    lm.model.requires_grad_(recipe.memory.trained == "all")
    gate = add_spalm_gate(lm.model, gates=recipe.memory.gates)
    if checkpoint is not None:
        gate.load_state_dict(_gate_of(checkpoint))
    loss = SpalmLoss(recipe.batches.carry)
    options = {"device": device, "show": show_progress}
    finished = run_to_the_end(recipe.schedule, lm, loss, train, valid, output, **options)

    del lm.model.spalm_gate
    gate.mixture(recipe.memory.k).save(output / "spalm.json")
    names = {"model": str(output / "model"), "mixture": str(output / "spalm.json")}
    summary = {**names, **finished.summary(lm)}
    with published(output / "model") as folder:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        write_spalm_card(folder / "README.md", recipe, summary)
    return summary


def _stored(recipe: SpalmRecipe, lm: LanguageModel, output: Path, show: bool) -> Datastore:
    """Return the datastore of the training text, every text once; a build that was broken off goes on.

    A document that is stored twice would find its own entries in the copy.
    """
    folder = output / "datastore"
    if folder.exists():
        with suppress(DatastoreError):  # killed before there was anything to open
            memory = Datastore(folder)
            if memory.manifest.complete:
                return memory
    once = {hashlib.sha256(item.text.encode()).digest(): item for item in Corpus(recipe.train)}
    return Datastore.build(lm, list(once.values()), folder, show_progress=show)


def _gate_of(checkpoint: Path) -> dict[str, Tensor]:
    """Return the gate that a checkpoint of the Trainer holds beside the model."""
    found = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(GATE)}  # noqa: SIM118
    return {name.removeprefix(GATE): tensor for name, tensor in found.items()}


def _check_carry(recipe: SpalmRecipe, start: LanguageModel) -> None:
    """Refuse a model that cannot carry so many tokens, before anything is written."""
    carry, length = recipe.batches.carry, recipe.batches.length
    if not carry:
        return
    limit = CarriedCache(start.model, carry).limit
    if limit is not None and carry + length > limit:
        raise ConfigError(
            f"carry = {carry} and length = {length} need {carry + length} positions, and {start.name} has learned "
            f"{limit}; lower one of them"
        )


def _segments(
    recipe: SpalmRecipe,
    lm: LanguageModel,
    memory: Datastore,
    paths: list[str],
    name: Path,
    limit: int | None,
    show: bool,
) -> SpalmSegments:
    """Return segments with their neighbors, which are found once and kept in a file."""
    documents = documents_of(paths, lm, name.with_suffix(".safetensors"), limit, show)
    path = name.with_name(f"{name.name}-neighbors.safetensors")
    if not path.exists():
        texts = [document.text for document, _ in zip(Corpus(paths), documents, strict=False)]
        found = neighbor_tokens(
            lm,
            documents,
            texts,
            memory,
            recipe.memory.k,
            own_document=recipe.memory.own_document,
            show_progress=show,
            description=f"neighbors of {name.name}",
        )
        with atomic_writer(path) as file:
            file.write(safetensors.numpy.save({"neighbors": found}))
    neighbors = safetensors.numpy.load_file(path)["neighbors"]
    batches, padding = recipe.batches, lm.tokenizer.eos_token_id or 0
    options = {"streams": batches.streams, "carry": batches.carry, "padding": padding}
    return spalm_segments(documents, neighbors, batches.length, **options)
