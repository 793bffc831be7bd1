"""A small network as a value: tensors that are saved with a mixture, and never trained in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError

LARGEST_NUMBER = 1e30  # sums of larger ones overflow a float32, and ∞ − ∞ is no number
# A file may ask for more than anyone fits: 64 numbers a layer, a key's width of features
_MOST_LAYERS, _WIDEST, _MOST_FEATURES = 8, 1024, 1 << 16


class Network:
    """Standardized features → tanh layers → outputs.

    Args:
        mean: Of each feature, float32, shape (features,).
        scale: By which each is divided, positive, same shape.
        layers: Weight (outputs, inputs) and bias (outputs,) of each layer in turn.

    Raises:
        ConfigError: Shapes do not fit one another or are far too large, or a tensor is not float32, or a number is not
            finite, or larger than 10³⁰.
    """

    def __init__(self, mean: Tensor, scale: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        tensors = [mean, scale, *(part for layer in layers for part in layer)]
        if any(part.dtype != torch.float32 for part in tensors) or any(part.ndim == 0 for part in tensors):
            raise ConfigError("the network of this mixture is damaged: its tensors are of other types; fit it again")
        width = len(mean)
        sound = mean.ndim == 1 and mean.shape == scale.shape and bool((scale > 0).all()) and bool(layers)
        for weight, bias in layers:
            sound = sound and bias.ndim == 1 and tuple(weight.shape) == (len(bias), width)
            width = len(bias)
        if not sound or not all(bool((part.abs() <= LARGEST_NUMBER).all()) for part in tensors):
            raise ConfigError("the network of this mixture is damaged: its layers do not fit; fit it again")
        widest = max(len(bias) for _, bias in layers)
        if len(layers) > _MOST_LAYERS or widest > _WIDEST or len(mean) > _MOST_FEATURES:
            raise ConfigError(
                f"the network of this mixture has {len(mean):,} features and {len(layers):,} layers, {widest:,} wide; "
                f"expected at most {_MOST_FEATURES:,}, {_MOST_LAYERS} and {_WIDEST:,}: fit it again"
            )
        self.mean, self.scale, self.layers = mean, scale, tuple((weight, bias) for weight, bias in layers)

    @property
    def parameters(self) -> int:
        """Numbers that were fitted."""
        return sum(part.numel() for layer in self.layers for part in layer)

    @property
    def inputs(self) -> int:
        """Features that it expects."""
        return len(self.mean)

    @property
    def outputs(self) -> int:
        """Numbers that it says of each target."""
        return len(self.layers[-1][1])

    def __call__(self, features: Tensor) -> Tensor:
        """Return what it says of features of shape (n, features), shape (n, outputs)."""
        if features.shape[1] != len(self.mean):
            raise ConfigError(
                f"the network expects {len(self.mean)} features, {features.shape[1]} are given; k or the memories "
                "differ from those that it was fitted to"
            )
        state = self.standardized(features)
        for place, (weight, bias) in enumerate(self.layers):
            state = nn.functional.linear(state, weight.to(state.device), bias.to(state.device))
            if place + 1 < len(self.layers):
                state = state.tanh()
        return state

    def standardized(self, features: Tensor) -> Tensor:
        """Return features of mean 0 and deviation 1 on the text that was fitted; what is far outside is cut off."""
        return ((features - self.mean.to(features.device)) / self.scale.to(features.device)).clamp(-6, 6)

    def with_last_bias(self, bias: Tensor) -> Network:
        """Return the network that says so much more, `bias` having shape (outputs,)."""
        weight, old = self.layers[-1]
        return Network(self.mean, self.scale, [*self.layers[:-1], (weight, old + bias)])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, for saving."""
        result = {"mean": self.mean, "scale": self.scale}
        for place, (weight, bias) in enumerate(self.layers):
            result |= {f"layers.{place}.weight": weight, f"layers.{place}.bias": bias}
        return result

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Network:
        """Take back what `tensors` gave.

        Raises:
            ConfigError: A tensor is missing, or does not fit.
        """
        try:
            number = sum(name.endswith(".weight") for name in tensors)
            layers = [(tensors[f"layers.{place}.weight"], tensors[f"layers.{place}.bias"]) for place in range(number)]
            return cls(tensors["mean"], tensors["scale"], layers)
        except KeyError as error:
            raise ConfigError(f"the network of this mixture lacks {error}; fit it again") from error

    @classmethod
    def new(cls, features: Tensor, widths: Sequence[int], seed: int = 0) -> Network:
        """Return a network that says zero of everything, for features like these; hidden layers are drawn."""
        scale = features.std(dim=0).clamp_min(1e-6) if len(features) > 1 else torch.ones(features.shape[1])
        generator = torch.Generator().manual_seed(seed)
        layers, inputs = [], features.shape[1]
        for place, outputs in enumerate(widths):
            size = inputs**-0.5 if place + 1 < len(widths) else 0.0
            layers.append((torch.randn(outputs, inputs, generator=generator) * size, torch.zeros(outputs)))
            inputs = outputs
        return cls(features.mean(dim=0), scale, layers)
