"""The hash of weights."""

from __future__ import annotations

import hashlib

import torch

from ..ir.digest import add_tensor


def weights_hash(*models: torch.nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the states, in name order, one tensor at a time."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            add_tensor(digest, name, tensor)
    return digest.hexdigest()
