"""Train a causal LM and its gate from a recipe; every step can be interrupted and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.numpy

from ..datastore import Datastore
from ..documents import Corpus
from ..errors import ConfigError
from ..files import atomic_writer, write_json
from ..models import LanguageModel, load
from ._card import write_spalm_card
from ._run import check_recipe, file_names, published
from ._run_trainer import begun, check_reports, check_texts, device_of, last_checkpoint, run_to_the_end
from ._spalm import SpalmLoss, add_spalm_gate
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
    check_recipe(recipe.describe(), recipe.fixed() if begun(output) else recipe.fixed()[:6], output)
    start = load(recipe.from_, device=device)
    if recipe.batches.length > start.positions:
        raise ConfigError(
            f"length = {recipe.batches.length} is longer than the {start.positions} positions of {start.name}"
        )
    add_spalm_gate(start.model, gates=recipe.memory.gates)  # refuses a model before anything is written
    del start.model.spalm_gate
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
    gate = add_spalm_gate(lm.model, gates=recipe.memory.gates)  # a checkpoint's is filled in by the Trainer
    loss = SpalmLoss(recipe.batches.carry)
    options = {"device": device, "show": show_progress}
    steps, clock, losses = run_to_the_end(recipe.schedule, lm, loss, train, valid, output, **options)

    mixture = gate.mixture(recipe.memory.k)
    del lm.model.spalm_gate
    summary: dict[str, Any] = {
        "model": str(output / "model"),
        "mixture": str(output / "spalm.json"),
        "steps": steps,
        "tokens": clock.tokens(steps),
        "tokens_per_epoch": clock.tokens(clock.updates),
        "parameters": lm.model.num_parameters(),
        "valid": losses,
    }
    mixture.save(output / "spalm.json")
    with published(output / "model") as folder:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        write_spalm_card(folder / "README.md", recipe, summary)
    return summary


def _stored(recipe: SpalmRecipe, lm: LanguageModel, output: Path, show: bool) -> Datastore:
    """Return the datastore of the training text; a build that was broken off goes on."""
    folder = output / "datastore"
    if folder.exists():
        memory = Datastore(folder)
        if memory.manifest.complete:
            return memory
    return Datastore.build(lm, recipe.train, folder, show_progress=show)


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
