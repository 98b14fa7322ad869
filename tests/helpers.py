"""What several test files share."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

import train

ROOT = Path(__file__).parents[1]
ALONE = train.Process(0, 1, torch.device("cpu"))
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
FAST = {"clips_per_s", "data_wait"}  # numbers of a line of the log that no two runs share


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equality, bit for bit, of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def lines(folder):
    """The lines of a run's log.jsonl, without what depends on the machine."""
    text = (folder / "log.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in FAST} for line in text.splitlines()]


def one_line(err, *says):
    """Asserts that the last line of what a command has said is an error of the user's that says these words."""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err, err
    assert all(str(word) in last for word in says), last


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def torchrun(script, *flags, processes=2, folder=None):
    """A script in so many processes, with one thread each: what `subprocess.run` gives."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(script), *map(str, flags)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
