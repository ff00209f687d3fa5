"""Network parameters as one flat array: how they travel and how they are told apart.

Parameters are here all that a network's `state_dict` holds: with those that are learned the buffers that its forward pass
needs (the singular vectors of a spectral norm), so that whoever loads a snapshot computes what the learner's network does.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import WireError
from common.messages import Array, ParamsSnapshot


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters by name, as views: to write on them is to write on the network."""
    return network.state_dict()


def layout(network: nn.Module) -> str:
    """Returns names and shapes of all parameters, in order: what both ends of a snapshot must agree on."""
    return ";".join(f"{name}{tuple(p.shape)}" for name, p in _tensors(network).items())


def flatten(network: nn.Module, *, bf16: bool = False) -> Array:
    """Returns a copy of all parameters in the order of `layout`.

    Returns:
      f32[N]; or u16[N], the bits of bf16 numbers, rounded to the nearest, ties to even.
    """
    flat = torch.cat([parameter.reshape(-1) for parameter in _tensors(network).values()]).float()
    return np.asarray((flat.bfloat16().view(torch.uint16) if bf16 else flat).cpu().numpy())


def load(network: nn.Module, snapshot: ParamsSnapshot) -> None:
    """Writes a snapshot, fp32 or bf16, into the network.

    Raises:
      WireError: where the snapshot is of another network or holds a number that is not finite; nothing is written then.
    """
    if snapshot.layout != layout(network):
        raise WireError("layout: the parameters are those of another network")
    if len(snapshot.params) != sum(p.numel() for p in _tensors(network).values()):
        raise WireError(f"params: {len(snapshot.params)} numbers do not fill the layout")
    snapshot.check_valid()
    bits = snapshot.params.dtype == np.uint16
    wide = (snapshot.params.astype(np.uint32) << 16).view(np.float32) if bits else snapshot.params
    unflatten(network, wide)


def unflatten(network: nn.Module, flat: Array) -> None:
    """Writes f32[N], what `flatten` returned for the same network, into the network."""
    numbers, start = torch.from_numpy(np.array(flat)), 0
    with torch.no_grad():
        for parameter in _tensors(network).values():
            parameter.copy_(numbers[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()


def digest(network: nn.Module) -> str:
    """Returns the SHA-256 of the layout and of every bit of the parameters, as 64 hexadecimal digits."""
    sha = hashlib.sha256(layout(network).encode())
    sha.update(flatten(network).astype("<f4").tobytes())
    return sha.hexdigest()
