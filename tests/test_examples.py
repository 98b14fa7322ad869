"""examples/: a method of one's own trains, resumes, runs in several processes and is evaluated like the others."""

import sys

import conftest
import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import simclr

SMALL = [*conftest.CONV4, "--batch_size=4", "--device=cpu"]


def grads(method):
    return {name: value.grad for name, value in method.named_parameters()}


def frozen(batch, rank=0, ranks=1):
    """Loss and gradients of this rank's share of a batch, of a method that is the same on every process."""
    torch.manual_seed(0)
    config = simclr.SimCLRConfig(encoder="conv4", width=0.25, crop=32, frames=8)
    method = simclr.SimCLR(config).eval().double()
    share = {name: value.chunk(ranks)[rank] for name, value in batch.items()}
    (loss,) = method(share).values()
    loss.backward()
    return loss.detach(), grads(method)


@pytest.fixture
def batch(monkeypatch):
    torch.manual_seed(1)
    return {
        "clip": torch.randint(256, (4, 2, 3, 8, 32, 32), dtype=torch.uint8),
        "color": torch.tensor([1, 1, 1, 0, 0, 0.0]).expand(4, 2, 2, 6),
    }
