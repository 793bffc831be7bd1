"""TRIME in transformers' own Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, default_data_collator
from transformers.trainer_utils import EvalLoopOutput

from ..errors import ConfigError
from ._segments import Segments
from ._spalm import SPALM_FIELDS
from ._trime import PLACES, TargetLogProbs


class MemoryLoss(Protocol):
    """What the Trainer needs of a loss: `TrimeLoss` or `SpalmLoss`."""

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor], *, update: int, updates: int, targets: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a batch, nats a target, with gradients."""
        ...

    def log_probs(self, model: Any, batch: Mapping[str, Tensor]) -> TargetLogProbs:
        """Return log P of the targets of a batch, with memory and without."""
        ...


class TrimeTrainer(Trainer):
    """A Trainer whose loss is `TrimeLoss` or `SpalmLoss`, and which leaves the rows of a dataset in their order.

    Checkpoints, resuming, accumulation, mixed precision and logging are the Trainer's. Evaluation reports `eval_loss`
    and `eval_perplexity` with memory, `eval_loss_without_memory` and `eval_perplexity_without_memory` from the same
    pass, in nats a token and by token, on whole batches: what is in a batch is what may be seen.

    Args:
        *args: See `transformers.Trainer`; `model` and `args` are the first two.
        loss: What may be seen, and when.
        **kwargs: See `transformers.Trainer`. Datasets are `Segments`, or any whose rows have `input_ids` and `labels`.

    Raises:
        ConfigError: The rows of a `Segments` that belong together do not make a batch of the Trainer, or a setting asks
            for another loss.
    """

    loss_is_scaled_for_ga = True  # divided by the targets of all batches of an update

    def __init__(self, *args: Any, loss: MemoryLoss, **kwargs: Any) -> None:
        super().__init__(*args, **({"data_collator": default_data_collator} | kwargs))
        self.memory_loss = loss
        self.model_accepts_loss_kwargs = True  # asks the Trainer to count targets …
        self._loss_shifts_labels = True  # … without each row's first label, whatever the model's own loss is
        if self.args.n_gpu > 1:
            raise ConfigError(
                "several GPUs in one process would tear batches apart; start one process a GPU by torchrun"
            )
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ConfigError(
                "label smoothing and compute_loss_func are other losses than that of the memory; leave them out"
            )
        sizes = ("train", self.args.train_batch_size), ("eval", self.args.eval_batch_size)
        for (split, size), dataset in zip(sizes, (self.train_dataset, self.eval_dataset), strict=True):
            if isinstance(dataset, Segments) and dataset.rows_per_batch != size:
                raise ConfigError(
                    f"per_device_{split}_batch_size is {size}, but {dataset.rows_per_batch} rows of the {split} "
                    "dataset belong together; make them equal, and use accumulation for larger updates"
                )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, as the Trainer asks for it."""
        progress = {"update": self.state.global_step, "updates": self.state.max_steps}
        loss = self.memory_loss(model, inputs, **progress, targets=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure the loss per target over a whole dataset, with memory and without."""
        model = self.accelerator.unwrap_model(self.model).eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # with memory, without, targets
        rows = 0
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                found = self.memory_loss.log_probs(model, batch)
            sums = [float(-part.sum(dtype=torch.float64)) for part in found]
            totals += totals.new_tensor([*sums, len(found.with_memory)])
            rows += len(batch["input_ids"])
        with_memory, without, targets = self.accelerator.reduce(totals).tolist()
        metrics = {}
        for name, total in (("", with_memory), ("_without_memory", without)):
            metrics[f"{metric_key_prefix}_loss{name}"] = total / max(targets, 1)
            metrics[f"{metric_key_prefix}_perplexity{name}"] = math.exp(min(total / max(targets, 1), 700.0))
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore[arg-type]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Leave a gate's size out of weight decay, as a bias is."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_size")]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset) if hasattr(dataset, "__len__") else None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or []), *PLACES, *SPALM_FIELDS]
