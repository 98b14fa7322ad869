"""Start and end of processes: this one's place in a run that torchrun starts, and the loaders' workers."""

import ctypes
import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from train import Process, TrainConfig, UserError


def _places() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of torchrun's environment; 0, 1 and 0 without one. Raises UserError where some
    are missing, are no numbers, or do not go together."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = {name: os.environ[name] for name in defaults if name in os.environ}
    values = [int(value) if value.isdecimal() else -1 for value in (defaults | given).values()]
    rank, world_size, local_rank, local_size = values
    needed = {"RANK", "WORLD_SIZE"} | ({"MASTER_ADDR", "MASTER_PORT"} if world_size > 1 else set())
    good = min(values) >= 0 and max(rank, local_rank) < world_size and local_size > 0
    if given and not (good and needed <= os.environ.keys()):
        raise UserError(
            f"the environment has {' '.join(f'{name}={value}' for name, value in given.items())}, which is not as "
            f"torchrun sets it: start several processes with torchrun, or one after `unset {' '.join(given)}`"
        )
    return rank, world_size, local_rank


def start_process(device: str = "auto", timeout: float = 10, deterministic: bool = False) -> Process:
    """Joins the run that torchrun's environment describes, or stands alone without it.

    Args:
        timeout: minutes after which it gives up waiting for another process.
        deterministic: have torch choose deterministic algorithms, and warn where it has none.

    Raises UserError: CUDA asked for where there is none, more processes than GPUs, an environment that is not
    torchrun's, or one whose other processes are not there.
    """
    rank, world_size, local_rank = _places()
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(True, warn_only=True)  # the backward of max_pool3d has no such form
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA GPU here")
    if device == "cpu" or not torch.cuda.is_available():
        place = torch.device("cpu")
        if sys.platform == "linux":  # keep the memory of freed tensors, not fault it in anew each step
            mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # C libraries other than glibc may lack it
            mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for large blocks
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    elif local_rank < torch.cuda.device_count():
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
        # Shapes stay the same: let it look for the fastest convolutions, which are not the same in each run.
        torch.backends.cudnn.benchmark = not deterministic
    else:
        raise UserError(f"process {local_rank} has no GPU: {torch.cuda.device_count()} here; lower --nproc_per_node")
    if world_size > 1 and not dist.is_initialized():
        try:
            meet(place, timeout)
        except (RuntimeError, ValueError, TimeoutError) as error:
            raise UserError(
                f"process {rank} of {world_size} does not meet the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]}): start all of them, with torchrun"
            ) from error
    return Process(rank, world_size, place)


def meet(place: torch.device, timeout: float) -> None:
    """Meets the other processes, or raises what torch does, or TimeoutError: torch by itself tries for longer than its
    time-out, and without end where something else answers, and tells each try in lines of its own."""
    outcome = []

    def join() -> None:
        try:
            if own:
                torch.cuda.set_device(place)  # each thread has its own
            dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(minutes=timeout), **own)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    own = {"device_id": place} if place.type == "cuda" else {}
    thread = threading.Thread(target=join, name=meet.__name__, daemon=True)
    held, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        thread.start()
        thread.join(min(60 * timeout, threading.TIMEOUT_MAX))
    finally:
        if thread.is_alive():  # and may tell more
            sys.stderr = os.fdopen(held, "w", buffering=1, errors="backslashreplace")
        else:
            os.dup2(held, 2)
            os.close(held)
    error = outcome[0] if outcome else TimeoutError(f"not all are there after --timeout {timeout:g} minutes")
    if error is not None:
        raise error


def end_process() -> None:
    """Leaves the run that `start_process` joined, if there is one."""
    if dist.is_initialized():
        # Until torch 2.7 a group ends with Python's lock held, and waits for gloo's threads, which may need that lock.
        # A backend ends without it: keep gloo's until the group is gone.
        if torch.__version__ < (2, 8) and dist.get_backend() == "gloo":
            _last = dist.group.WORLD._get_backend(torch.device("cpu"))
        dist.destroy_process_group()


def loader_workers(config: TrainConfig) -> int:
    """Number of loader processes: `--workers`, or this process's share of the CPU cores, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.workers if config.workers >= 0 else min(8, max(1, cores // local))
