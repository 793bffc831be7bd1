"""How much memory a computation keeps for its gradient, counted by torch's own hooks on saved tensors."""

import torch


def saved_bytes(compute, *parameters):
    """Return the bytes of all memory that `compute()` keeps for the backward pass, each once, parameters' aside."""
    kept, known = {}, {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in known)
