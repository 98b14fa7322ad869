"""The training loop that every method shares: options, processes, optimiser, log, checkpoints, resuming.

Imports torch and tqdm only. A method is an `nn.Module` whose `forward(batch)` returns a dict of named scalar losses and
leaves numbers in `.metrics`, among them "chance/NAME", what loss NAME is at chance. `fit` sums the losses, steps, logs
and saves. What is random in a step follows from (seed, step, rank) and what is random in a sample from (seed, epoch,
index), so a checkpoint needs no random state to continue exactly. A method may have `warnings(line)`, which says what a
line of the log shows to be wrong.

One process needs no process group; `torchrun --nproc_per_node=N method.py …` runs N of them, one a GPU.
"""

import contextlib
import copy
import ctypes
import dataclasses
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HANGUP = getattr(signal, "SIGHUP", 0)  # Windows has none


class UserError(Exception):
    """Something the user can mend: `command_line` prints it as one line and exits with code 2."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, given as its number, and has saved its state."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Where only what the user asked for can raise a ValueError or OSError, makes it a UserError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error).strip() or type(error).__name__) from error


# ---------------------------------------------------------------------------------------------------------- options


def option(default: Any, help: str, allowed: tuple = ()) -> Any:
    """A field of a config dataclass, which `parse` makes a command-line flag.

    Args:
        allowed: of a text, the choices, if not any is; of a number, which needs them, the least and the greatest.
    """
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed})


SWITCH = ("off", "on")  # choices of an option whose flag alone means "on"


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of the configs, whose fields are all made by `option`.

    Raises:
        UserError: a value of another type, none of the choices, out of range, or not a number.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_option(field, getattr(self, field.name))


def check_option(field: dataclasses.Field, value: Any) -> None:
    """Raises UserError where a field made by `option` can't have this value."""
    kinds = {int: (int, "a whole number"), float: ((int, float), "a number"), str: (str, "a text")}
    (kind, what), allowed = kinds[field.type], field.metadata["allowed"]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"--{field.name} of type {type(value).__name__}: must be {what}")
    if field.type is not str and not allowed[0] <= value <= allowed[1]:  # nan, too
        raise UserError(f"--{field.name} {value}: must be {_range(allowed)}")
    if field.type is str and allowed and value not in allowed:
        raise UserError(f"--{field.name} {value}: choose from {', '.join(filter(None, allowed))}")


def _range(limits: tuple) -> str:
    """ "0 to 1e+06" of the least and the greatest number."""
    return " to ".join(str(limit) if isinstance(limit, int) else f"{limit:g}" for limit in limits)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """What `fit` needs; a method's config inherits from it."""

    epochs: int = option(200, "passes over the data set, the length of the half-cosine schedule", (1, 10**6))
    batch_size: int = option(8, "videos a process; the total batch is this times the number of processes", (1, 65_536))
    lr: float = option(0.04, "learning rate at a total batch of 256, scaled linearly (0.00375 at 24)", (0, 1e6))
    sgd_momentum: float = option(0.9, "momentum of SGD", (0, 1))
    weight_decay: float = option(1e-4, "weight decay of SGD", (0, 1000))
    precision: str = option("auto", "auto: bf16 on GPUs that have it, from torch 2.11 on", ("auto", "float32", "bf16"))
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    workers: int = option(-1, "loader processes of each process; -1: its share of the CPU cores, at most 8", (-1, 1024))
    seed: int = option(0, "seed of everything random", (0, 2**31 - 1))
    out: str = option("", "run folder (default: runs/METHOD-DATASET-TIME, or the folder of --resume)")
    resume: str = option(
        "",
        "checkpoint to continue, with its options unless others are given; auto: the one of most steps in --out, or "
        "else beside --checkpoint or below runs/, whose options and videos are these, or a new run",
    )
    changed_data: str = option(
        "off", "resume although the videos, their labels or sizes are not those that the checkpoint has seen", SWITCH
    )
    max_steps: int = option(0, "stop and save after this step of the schedule; 0: run all of it", (0, 2**31 - 1))
    log_every: int = option(10, "steps between two lines of log.jsonl", (1, 10**6))
    keep_every: int = option(0, "epochs between two checkpoints kept for good; 0: keep the latest only", (0, 10**6))
    save_minutes: float = option(30.0, "minutes after which a line of the log comes with a checkpoint, too", (0, 1e6))
    on_nan: str = option(
        "stop",
        "what to do where a loss or its gradient is not finite. stop: the run ends, and its last checkpoint is from "
        "before; skip: leave the step out, which costs a copy of the model's state and a wait for the GPU each step",
        ("stop", "skip"),
    )
    deterministic: str = option("off", "deterministic algorithms on a GPU, too, where torch has them; slower", SWITCH)
    timeout: float = option(10.0, "minutes after which a process gives up waiting for another one", (0.01, 1e6))
    max_bad: float = option(0.05, "stop when more than this share of an epoch's videos cannot be read", (0, 1))

    LR_BATCH = 256  # total batch at which `lr` holds
    # What resuming may change, FREE for what defines no run, TUNED for what does; another of the rest is another run.
    FREE = frozenset(
        "precision device workers out resume changed_data max_steps log_every keep_every save_minutes on_nan "  # noqa: SIM905
        "deterministic timeout max_bad".split()
    )
    TUNED = frozenset({"epochs", "batch_size", "lr", "sgd_momentum", "weight_decay"})

    def learning_rate(self, total_batch: int, epoch: float) -> float:
        """Half-period cosine per step from the linearly scaled rate (Goyal et al. 2017; FIMA Sec. 4.1)."""
        return self.lr * total_batch / self.LR_BATCH * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


Config = TypeVar("Config", bound=Options)


def _method_name(config_class: type[Options]) -> str:
    """What a checkpoint is said to be of: FIMA for FIMAConfig."""
    return config_class.__name__.removesuffix("Config")


def _program() -> list[str]:
    """How the program was called, without its flags: the script and, where it has such, the sub-command."""
    return list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv))


# -------------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device

    def say(self, text: str) -> None:
        """Prints on the first process, above the progress bar."""
        if self.rank == 0:
            tqdm.write(text)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The first process runs the block before the others do, so that it alone makes what is made once."""
        if self.rank > 0:
            dist.barrier()
        try:
            yield
        finally:
            if self.rank == 0 and self.world_size > 1:
                dist.barrier()

    def of_first(self, function: Callable[[], Any]) -> Any:
        """What a function gives, or raises for the user, on the first process; on every process."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except (UserError, ValueError, OSError) as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, entries: list) -> list:
        """The entries of all processes, on each."""
        shares = [entries] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(shares, entries)
        return [entry for share in shares for entry in share]

    def sums(self, *counts: int) -> list[int]:
        """Each count, summed over the processes."""
        if self.world_size == 1:
            return list(counts)
        totals = torch.tensor(counts, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()


def progress(process: Process, *arguments: Any, **options: Any) -> tqdm:
    """A progress bar with ETA on the first process, drawn twice a second in a terminal, twice a minute in a file."""
    pause = 0.5 if sys.stderr.isatty() else 30
    return tqdm(*arguments, disable=process.rank > 0, dynamic_ncols=True, mininterval=pause, **options)


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors, not give it back to the system and fault it in anew each step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries may lack it
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for large blocks
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def _places() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of torchrun's environment; 0, 1 and 0 without one.

    Raises:
        UserError: some are missing, are no numbers, or do not go together.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = {name: os.environ[name] for name in defaults if name in os.environ}
    values, missing, wrong = (defaults | given).values(), {"RANK", "WORLD_SIZE"} - given.keys() if given else set(), ""
    if not all(value.isdecimal() for value in values):
        wrong = "not whole numbers"
    else:
        rank, world_size, local_rank, local_size = map(int, values)
        if world_size > 1:
            missing |= {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
        if missing:
            wrong = f"without {' and '.join(sorted(missing))}"
        elif not (rank < world_size and local_rank < world_size and local_size > 0):
            wrong = "no rank among so many processes"
    if wrong:
        raise UserError(
            f"the environment has {' '.join(f'{name}={value}' for name, value in given.items())}, {wrong}, as a "
            f"scheduler may leave it: start several processes with torchrun, or one after `unset {' '.join(given)}`"
        )
    return rank, world_size, local_rank


def start_process(device: str = "auto", timeout: float = 10, deterministic: bool = False) -> Process:
    """Joins the run that torchrun's environment describes, or stands alone without it.

    Args:
        timeout: minutes after which it gives up waiting for another process.
        deterministic: have torch choose deterministic algorithms, and warn where it has none.

    Raises:
        UserError: CUDA asked for where there is none, more processes than GPUs, an environment that is not torchrun's,
            or one whose other processes are not there.
    """
    rank, world_size, local_rank = _places()
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by cuBLAS when it starts
        torch.use_deterministic_algorithms(True, warn_only=True)  # the backward of max_pool3d has no such form
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: torch finds no CUDA GPU here; use --device cpu, or install a CUDA build of torch"
        )
    if device == "cpu" or not torch.cuda.is_available():
        place = torch.device("cpu")
        keep_freed_memory()
    elif local_rank < torch.cuda.device_count():
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
        # Shapes stay the same: let it look for the fastest convolutions, which are not the same in each run.
        torch.backends.cudnn.benchmark = not deterministic
    else:
        raise UserError(f"process {local_rank} has no GPU: {torch.cuda.device_count()} here; lower --nproc_per_node")
    if world_size > 1 and not dist.is_initialized():
        try:
            _join(place, timeout)
        except (RuntimeError, ValueError, TimeoutError) as error:
            at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"process {rank} of {world_size} does not meet the others at {at} ({str(error).splitlines()[0]}): "
                "start all of them, with torchrun, and with a port that is free"
            ) from error
    return Process(rank, world_size, place)


def _join(place: torch.device, timeout: float) -> None:
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
    thread = threading.Thread(target=join, name=_join.__name__, daemon=True)
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
    """Leaves the run that `start_process` joined, if there is one, and frees the run folders that this process has."""
    while _locks:
        _locks.popitem()[1].close()
    if dist.is_initialized():
        # Until torch 2.7 a group ends with Python's lock held, and waits for gloo's threads, which may need that lock
        # to let their last tensors go. A backend ends without holding it: keep gloo's until the group is gone.
        if torch.__version__ < (2, 8) and dist.get_backend() == "gloo":
            _last = dist.group.WORLD._get_backend(torch.device("cpu"))
        dist.destroy_process_group()


def loader_workers(config: TrainConfig, process: Process) -> int:
    """Number of loader processes: `--workers`, or this process's share of the CPU cores, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.workers if config.workers >= 0 else min(8, max(1, cores // local))


def leave_signals(_worker: int) -> None:
    """Takes a loader's worker out of the process group, which a terminal's Ctrl-C and a launcher's SIGTERM reach whole.

    The training process decides, and needs its workers until it has saved; what it tells them itself, they obey.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker has inherited its parent's handler
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def average_batch_norm(model: nn.Module) -> None:
    """Averages the running statistics of batch norm, the one thing in which the processes differ, over them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:  # a frozen one stays bit for bit
            for statistic in (module.running_mean, module.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()


# ------------------------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError of the system that has no name, as that of a full disk, the one of what was written."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes a file atomically: at every moment it holds the old content or the new, whole. A link stays one.

    Raises:
        OSError: it cannot be written, as on a full disk; it is as it was, and nothing half is left.
    """
    target = os.path.realpath(path)
    partial = f"{target}.{os.urandom(4).hex()}.partial"  # of this writer alone
    try:
        with open(partial, "xb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def check_replaceable(path: str | Path, *beginnings: bytes) -> None:
    """Raises UserError where `path` is there, is not empty, and does not begin like what is to be written there."""
    begin = None
    if os.path.isfile(path):
        with open(path, "rb") as file:
            begin = file.read(64)
    if os.path.exists(path) and begin != b"" and not (begin and begin.startswith(beginnings)):
        what = "a folder" if os.path.isdir(path) else "something else than what would be written there"
        raise UserError(f"{path} is {what}: name another --out")


# ------------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a checkpoint by `write_file`.

    Raises:
        UserError: it cannot be written, as on a full disk; `path` is as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)  # in memory, as torch.save hides why a file cannot be written
    try:
        write_file(path, buffer.getbuffer())
    except OSError as error:
        before = "still holds the checkpoint before" if path.exists() else "does not exist yet"
        raise UserError(f"step {state['step']} cannot be saved: {error.strerror}; {path} {before}") from error


CHECKPOINT = {"method": str, "config": dict, "model": dict, "optimizer": dict}
CHECKPOINT |= dict.fromkeys(("step", "steps_per_epoch", "world_size"), int)
COUNTS = {"step": 0, "steps_per_epoch": 1, "world_size": 1, "bad_videos": 0, "skipped_steps": 0}  # at least these
THIS_START = {"out", "resume", "max_steps", "changed_data"}  # options that a checkpoint does not hand on


def load_checkpoint(path: str | Path, foreign: bool = False, whole: bool = True) -> dict:
    """A checkpoint of `fit`: what `CHECKPOINT` names, each of its type; runs no code in it.

    Args:
        foreign: take another project's file too, as a checkpoint of no method and no config whose "model" is all of it.
        whole: read and check the tensors' bytes, too, not only what is said of them.

    Raises:
        UserError: no such file, no permission, damaged, or not a checkpoint of this project, or one of the conv4 of
            old.
    """

    def others() -> str:
        names = ", ".join(sorted(other.name for other in Path(path).parent.glob("epoch_*.pt") if other != Path(path)))
        return f"; beside it lie {names}" if names else ""

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileNotFoundError
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
        if whole and zipfile.is_zipfile(path) and (wrong := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(wrong)  # torch compares no check sums
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no checkpoint at {path}") from error
    except OSError as error:
        reason = "no permission" if isinstance(error, PermissionError) else error.strerror or error
        raise UserError(f"{path} can't be read: {reason}") from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever its readers meet: pickle, zip, runtime and end-of-file errors
        raise UserError(
            f"{path} is damaged, or no checkpoint, or holds code, which is never run{others()}"
            + "; if you trust it, have its own code save the state dict alone" * foreign
        ) from error
    if not isinstance(state, dict) or not CHECKPOINT.keys() <= state.keys():
        if foreign:
            return {"method": "", "config": {}, "model": state}
        raise UserError(f"{path} is no checkpoint of this project: it lacks some of {', '.join(sorted(CHECKPOINT))}")
    state = {"bad_videos": 0, "skipped_steps": 0} | state  # which older ones lack
    good = {name: isinstance(state[name], kind) for name, kind in CHECKPOINT.items()}
    good |= {name: type(state[name]) is int and least <= state[name] < 2**63 for name, least in COUNTS.items()}
    if good["model"]:
        good["model"] = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state["model"].items())
    if wrong := ", ".join(name for name in good if not good[name]):
        raise UserError(f"{path} is damaged, or of other code: no valid {wrong} in it{others()}")
    if any(name.endswith("units.0.conv3d.weight") for name in state["model"]):
        raise UserError(f"{path} is of conv4 before its feature pixels were centred: only code of then takes it")
    return state


def saved_options(path: str | Path, state: dict, config_class: type[Options], given: Container[str] = ()) -> dict:
    """Those options of a checkpoint that a config has, but for what belongs to one start of a run.

    Raises:
        UserError: one that is not given anew has a value that it can't have.
    """
    fields = [field for field in dataclasses.fields(config_class) if field.name in state["config"].keys() - THIS_START]
    for field in fields:
        if field.name not in given:
            try:
                check_option(field, state["config"][field.name])
            except UserError as error:
                raise UserError(f"{path} was made with {error}") from error
    return {field.name: state["config"][field.name] for field in fields}


def load_model(path: str | Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads the tensors of a checkpoint; raises UserError where they are not those of the model."""
    held, wanted = (
        {k: f"{tuple(v.shape)} {v.dtype} {v.layout}".replace("torch.", "") for k, v in tensors.items()}
        for tensors in (state, model.state_dict())
    )
    if wrong := [name for name in wanted | held if held.get(name) != wanted.get(name)]:
        before, now = (forms.get(wrong[0], "missing") for forms in (held, wanted))
        more = f"; so do {len(wrong) - 1} more" * (len(wrong) > 1)
        raise UserError(f"{path} does not fit this model: {wrong[0]} differs, {before} in it, {now} here{more}")
    model.load_state_dict(state)


def check_sums(module: nn.Module) -> dict[str, int]:
    """Of each tensor of a module's state."""
    state = {k: v.cpu().contiguous().flatten().view(torch.uint8) for k, v in module.state_dict().items()}
    return {name: zlib.crc32(value.numpy()) for name, value in state.items()}


def pack(seen: dict) -> Tensor:
    """What a run has seen, as a checkpoint holds it: its videos' lists are long."""
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(seen).encode())), dtype=torch.uint8)


def unpack(path: str | Path, state: dict) -> dict:
    """What the run of a checkpoint has seen; nothing, if it was written before that was kept."""
    try:
        return json.loads(zlib.decompress(state["seen"].numpy())) if "seen" in state else {}
    except (AttributeError, TypeError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged, or of other code: no valid seen in it") from error


# ------------------------------------------------------------------------------------------------------- run folder


def git_commit() -> str:
    """Commit of the code that runs, "+changes" if the tree differs from it; "" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+changes" if changes.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "av", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


_locks: dict[str, TextIO] = {}  # of the run folders that this process has


def claim_folder(path: Path, resume: str = "") -> None:
    """Makes a run folder this process's own, until `end_process` or the process's end, also by a kill.

    The lock is the system's, on the file `lock`, of a kind (POSIX record) that children do not inherit. Over NFS it
    holds between machines where the server's lock service runs. Where there is none, and on Windows, a line says that
    nothing keeps a second run away. What a killed run left half-written is deleted.

    Raises:
        UserError: another process has the folder, or it holds another run than that of the checkpoint to resume, if
            any, or logs that are not of a run.
        OSError: it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    if (name := os.path.realpath(path)) not in _locks:  # to open and close it again would free it
        check_replaceable(path / "lock", b"process ")
        file = open(path / "lock", "a+")  # noqa: SIM115, as end_process closes it
        try:
            if not fcntl:
                raise OSError("this system has none")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise UserError(f"{path} is in use by {holder}: wait for its end, or name another --out") from error
        except OSError as error:
            print(f"warning: {path} can't be locked ({error.strerror or error}): start no second run with this --out")
        _locks[name] = file
        with naming(file.name):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
    if not resume or Path(resume).parent.resolve() != path.resolve():
        for saved in (path / "checkpoint.pt", *sorted(path.glob("epoch_*.pt"))):
            if saved.exists():
                raise UserError(
                    f"{path} holds a run already: continue it with --resume {shlex.quote(str(saved))}, move it away if "
                    "it is damaged, or name another --out"
                )
        for log in (path / "log.jsonl", path / "bad_videos.log"):
            if log.exists() and not (path / "run.json").exists():
                raise UserError(f"{log} is of no run, as there is no run.json beside it: name another --out")
    saved = Path(os.path.realpath(path / "checkpoint.pt"))
    names = ("epoch_*.pt", "run.json", "log.jsonl", "bad_videos.log", "result.json", "result_confusion.png")
    for folder, name in ((saved.parent, saved.name), *((path, name) for name in names)):
        for left in folder.glob(f"{name}.????????.partial"):
            left.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        UserError: it can't be read, or is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from error


def read_starts(path: Path) -> list[dict]:
    """run.json: a dict for each start of a run, the last one last; raises UserError as `read_json` does."""
    starts = read_json(path)
    for start in starts if isinstance(starts, list) and starts else [None]:
        if not (isinstance(start, dict) and all(isinstance(start.get(name), dict) for name in ("config", "versions"))):
            raise UserError(f"{path} is damaged (no list of starts with their config and versions): move it away")
    return starts


def read_lines(path: Path) -> list[tuple[bytes, dict[str, float] | None]]:
    """The lines of log.jsonl, but blank ones, each with its numbers; None for a damaged one, as a kill may cut it."""
    return [(line, _numbers_of(line)) for line in path.read_bytes().splitlines() if line.strip()]


def _numbers_of(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
        numbers = [float(value) for value in record.values() if type(value) in (int, float)]
        good = len(numbers) == len(record) and all(0 <= record[name] < math.inf for name in ("step", "epoch"))
    except (AttributeError, KeyError, OverflowError, RecursionError, ValueError):
        return None
    return record if good else None


class RunFolder:
    """config, command, commit and versions in run.json; numbers in log.jsonl; unreadable videos in bad_videos.log;
    TensorBoard's events where it is installed. Only the first process needs the folder, and writes there.

    Raises:
        UserError: its run.json is damaged.
    """

    def __init__(self, path: Path, config: TrainConfig, process: Process, start_step: int, steps_per_epoch: int):
        self.path, self.writes = path, process.rank == 0
        self.board = None
        if not self.writes:
            return
        record = path / "run.json"
        self.starts = read_starts(record) if record.exists() else []
        self.starts.append(
            {
                "command": shlex.join([sys.executable, *sys.argv]),
                "config": dataclasses.asdict(config),
                "start_step": start_step,
                "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "git_commit": git_commit(),
                "versions": versions(),
                "processes": process.world_size,
                "hardware": torch.cuda.get_device_name()
                if process.device.type == "cuda"
                else f"{os.cpu_count()} CPU cores",
            }
        )
        self.note()
        log, bad_videos = path / "log.jsonl", path / "bad_videos.log"
        lines = read_lines(log) if log.exists() else []
        if damaged := [line for line, numbers in lines if numbers is None]:
            process.say(f"note: {len(damaged)} damaged lines of {log} are left out, as a kill may leave one")
        if lines:  # later steps come again; by the epoch, as with another batch a step is another part of it
            last = (start_step + 0.6) / steps_per_epoch
            write_file(log, b"".join(line + b"\n" for line, numbers in lines if numbers and numbers["epoch"] < last))
        if bad_videos.exists():
            content = bad_videos.read_bytes()
            write_file(bad_videos, content[: content.rfind(b"\n") + 1])  # a kill may have cut the last line
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path), purge_step=start_step + 1)

    def note(self, **facts: Any) -> None:
        """Writes run.json, with facts about this start of the run that have come to be known."""
        if self.writes:
            self.starts[-1] |= facts
            write_file(self.path / "run.json", json.dumps(self.starts, indent=1) + "\n")

    def log(self, record: dict[str, float]) -> None:
        """Appends one line of numbers."""
        if self.writes:
            with naming(self.path / "log.jsonl"), open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if self.board is not None:
            with naming(self.path):
                for name, value in record.items():
                    self.board.add_scalar(name, value, record["step"])

    def log_bad(self, step: int, bad: list[tuple[str, str]]) -> None:
        """Names videos that could not be read in the batches up to a step, and why; each video once."""
        if bad and self.writes:
            path = self.path / "bad_videos.log"
            with naming(path), open(path, "a+", encoding="utf-8", errors="backslashreplace") as file:
                file.seek(0)
                named = file.read()
                lines = {path: f"step {step}\t{path!r}\t{reason}".splitlines()[0] + "\n" for path, reason in bad}
                file.writelines(line for path, line in lines.items() if f"\t{path!r}\t" not in named)

    def close(self) -> None:
        """Writes what TensorBoard still holds back."""
        if self.board is not None:
            with user_errors(), naming(self.path):
                self.board.close()


def describe(losses: dict[str, float]) -> str:
    """ "vv 5.02 (chance 5.55)  pix …" of one line of the log, or of means of them."""
    names = [name.removeprefix("loss/") for name in losses if name.startswith("loss/")]
    return "  ".join(f"{name} {losses['loss/' + name]:.3f} (chance {losses['chance/' + name]:.3f})" for name in names)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of training gave on this process: its number (from 1), numbers, and the videos in its batch."""

    number: int
    numbers: dict[str, Tensor | float]
    videos: list[str]

    def is_finite(self) -> bool:
        """Whether the loss and the norm of its gradient are; waits for the device."""
        return all(math.isfinite(self.numbers[name]) for name in ("loss", "grad_norm"))

    def __str__(self) -> str:
        numbers = {name: float(value) for name, value in self.numbers.items()}
        videos = f"; videos {', '.join(map(repr, self.videos))}" if self.videos else ""
        return f"step {self.number}: {describe(numbers)}  norm of the gradient {numbers['grad_norm']:.3g}{videos}"


class Meter:
    """The steps between two lines of the log; waits for the device only when it is read."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.waited, self.since = 0.0, time.perf_counter()

    def read(self, process: Process, clips: int) -> dict[str, float]:
        """Means over steps and processes, clips/s of the whole run, share of time spent waiting for data; resets.

        Raises:
            UserError: a loss or gradient is not finite, in this process or in another.
        """
        names, count = list(self.steps[0].numbers), len(self.steps)
        sums = [sum(step.numbers[name] for step in self.steps) for name in names]
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=process.device) for v in sums])
        if process.world_size > 1:
            dist.all_reduce(values)
        means = dict(zip(names, (values / (count * process.world_size)).tolist(), strict=True))
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            broken = next((step for step in self.steps if not step.is_finite()), "in another process")
            raise UserError(
                f"process {process.rank}: a loss or its gradient is not finite, {broken}; the last checkpoint, if any, "
                "is from before; try a lower --lr, --precision float32, or --on_nan skip"
            )
        elapsed = time.perf_counter() - self.since
        means |= {"clips_per_s": clips * count / elapsed, "data_wait": self.waited / elapsed}
        self.__init__()
        return means


# -------------------------------------------------------------------------------------------------------------- fit


def autocast_bf16(config: TrainConfig, process: Process) -> bool:
    """Whether to run in bf16; 3-D convolutions in it are slow or wrong in the cuDNN of older torch.

    Raises:
        UserError: bf16 asked for on a CPU, where the weight gradient of torch's conv3d is wrong under autocast.
    """
    if process.device.type != "cuda":
        if config.precision == "bf16":
            raise UserError(
                "--precision bf16 needs a GPU: on a CPU, torch's 3-D convolutions get wrong gradients in it"
            )
        return False
    if config.precision == "bf16" and (torch.backends.cudnn.version() or 0) < 91500:
        process.say("warning: cuDNN before 9.15 has slow or wrong bf16 3-D convolutions; consider --precision float32")
    recent = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
    supported = recent and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16" or (config.precision == "auto" and supported)


def to_device(batch: dict, device: torch.device, stream: "torch.cuda.Stream | None") -> dict:
    """A batch with its tensors on the device; when it returns, the loader may use their memory again.

    On a GPU the copies run in a stream of their own, while the step before, launched and not awaited, still computes.
    """
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if stream is not None:
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(torch.cuda.current_stream())  # not to be freed before this stream is done with it
    return batch


@contextlib.contextmanager
def noted_signals(process: Process) -> Iterator[list[int]]:
    """Has SIGINT, SIGTERM and, unless it is ignored, SIGHUP noted in a list, to be obeyed when it suits.

    A second one is obeyed at once, but for SIGHUP: each stream of a terminal that is gone raises it.
    """
    caught: list[int] = []
    own = os.getpid()

    def note(number: int, _frame: Any) -> None:
        if os.getpid() != own or (caught and number != HANGUP):  # a process forked from this one is to end at once
            raise KeyboardInterrupt
        caught.append(number)
        if len(caught) == 1:
            process.say("stopping after this step, to save; once more to stop without saving")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN:
        numbers.append(HANGUP)
    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Run:
    """What a run moves on step by step, saves and restores: method, optimiser, and the count of steps."""

    MOST_LEFT_OUT = 10  # steps in a row; with more, --on_nan skip stops the run, too

    def __init__(
        self,
        method: nn.Module,
        config: Config,
        process: Process,
        steps_per_epoch: int,
        paths: Sequence[str] = (),
        seen: dict | None = None,
    ):
        self.method, self.config, self.process, self.paths = method.to(process.device).train(), config, process, paths
        self.steps_per_epoch, self.total_batch = steps_per_epoch, config.batch_size * process.world_size
        trainable = [p for p in method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, config.lr, config.sgd_momentum, weight_decay=config.weight_decay)
        self.done = 0  # steps
        self.bad_videos = self.skipped = 0  # of this epoch: unreadable videos in this process, steps left out
        self.skipped_in_a_row = 0
        self.seen = seen or {}
        if config.resume:
            self.restore()
        self.packed = pack(self.seen)
        if process.world_size > 1:
            self.check_agreement()
        self.bf16 = autocast_bf16(config, process)
        self.copies = torch.cuda.Stream() if process.device.type == "cuda" else None
        self.model = method
        if process.world_size > 1:  # batch-norm statistics are each process's own; `save` averages them
            self.model = nn.parallel.DistributedDataParallel(
                method, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def restore(self) -> None:
        """Goes to where the checkpoint `config.resume` was saved.

        Where an epoch has other steps than it had, by another batch, data set or number of processes, this is the same
        place in the schedule, and the run says so.

        Raises:
            UserError: it is of another architecture.
        """
        config, process, path = self.config, self.process, self.config.resume
        state, asked = load_checkpoint(path), dataclasses.asdict(config)
        load_model(path, self.method, state["model"])
        known = saved_options(path, state, type(config), asked)
        changed = {k: v for k, v in known.items() if type(v) in (int, float, str) and asked[k] != v}
        if changed:
            process.say("note: goes on with " + ", ".join(f"--{k} {asked[k]} (was {v})" for k, v in changed.items()))
        momenta = state["optimizer"].get("state")
        try:
            shapes = {i: tuple(entry["momentum_buffer"].shape) for i, entry in momenta.items()}
        except (AttributeError, IndexError, KeyError, TypeError):
            shapes = {None: ()}
        if (
            not shapes.items()
            <= {i: tuple(p.shape) for i, p in enumerate(self.optimizer.param_groups[0]["params"])}.items()
        ):
            raise UserError(f"{path} is damaged, or of other code: no valid optimizer in it")
        # Its groups have the options of then; the learning rate is set in each step.
        self.optimizer.load_state_dict({"state": momenta, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.seen = unpack(path, state) | self.seen
        self.done, before = state["step"], state["steps_per_epoch"]
        if (before, state["world_size"]) != (self.steps_per_epoch, process.world_size):
            self.done = round(self.done * self.steps_per_epoch / before)
            process.say(
                f"note: {path} was saved by {state['world_size']} processes with {before} steps an epoch, now it is "
                f"{process.world_size} with {self.steps_per_epoch}: goes on at the same part of the schedule with the "
                "same weights, queues and optimiser, but with other batches, so the result will be another one"
            )
        elif self.done % before:
            self.skipped = state["skipped_steps"]
            self.bad_videos = state["bad_videos"] if process.rank == 0 else 0

    def check_agreement(self) -> None:
        """Compares check sums of weights, queues and statistics over the processes.

        Raises:
            UserError: they differ.
        """
        sums = {"the step": self.done} | check_sums(self.method)
        all_sums = [sums] * self.process.world_size
        dist.all_gather_object(all_sums, sums)
        differing = [name for name in sums if len({other[name] for other in all_sums}) > 1]
        if differing:
            raise UserError(
                f"process {self.process.rank}: after step {self.done} the processes hold different values of "
                f"{differing[0]}, and of {len(differing) - 1} more; the last checkpoint, if any, is from before"
            )

    def save(self, folder: Path, bad_videos: int) -> None:
        """Writes checkpoint.pt, and epoch_N.pt where one is due; `bad_videos`: of this epoch in all processes.

        Raises:
            UserError: it cannot be written, or the processes differ.
        """
        if self.process.world_size > 1:
            average_batch_norm(self.method)
            self.check_agreement()
        if self.process.rank == 0:
            state = {
                "method": _method_name(type(self.config)),
                "config": dataclasses.asdict(self.config),
                "model": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.done,
                "steps_per_epoch": self.steps_per_epoch,
                "world_size": self.process.world_size,
                "bad_videos": bad_videos,
                "skipped_steps": self.skipped,
                "seen": self.packed,
                "versions": versions(),
            }
            epoch, rest = divmod(self.done, self.steps_per_epoch)
            if self.config.keep_every and rest == 0 and epoch % self.config.keep_every == 0:
                save_checkpoint(folder / f"epoch_{epoch:04d}.pt", state)
            save_checkpoint(folder / "checkpoint.pt", state)  # last: whoever is killed in between makes both again
        if self.process.world_size > 1:
            dist.barrier()

    def step(self, batch: dict) -> Step | None:
        """Trains on a batch; None where `on_nan` has the step left out.

        Raises:
            UserError: too many steps in a row would be left out.
        """
        config, process = self.config, self.process
        videos = [self.paths[i] for i in batch["index"].tolist()] if self.paths and "index" in batch else []
        before = copy.deepcopy(self.method.state_dict()) if config.on_nan == "skip" else None
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.total_batch, self.done / self.steps_per_epoch)
        seed = ((config.seed * 1_000_003 + self.done) * 65_537 + process.rank) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device, which takes long
        if process.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        batch = to_device(batch, process.device, self.copies) | {"epoch": self.done / self.steps_per_epoch}
        with torch.autocast(process.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.model(batch)
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = itertools.chain(*(group["params"] for group in self.optimizer.param_groups))
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        numbers = {"loss": loss.detach()} | {f"loss/{k}": v.detach() for k, v in losses.items()} | {"grad_norm": norm}
        if "overlap" in batch:
            numbers["overlap"] = batch["overlap"].mean()
        self.done += 1
        step = Step(self.done, numbers | self.method.metrics, videos)
        if before is None or not any(process.sums(not step.is_finite())):  # all processes decide alike
            self.optimizer.step()
            self.skipped_in_a_row = 0
            return step
        self.method.load_state_dict(before)
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.MOST_LEFT_OUT:
            raise UserError(
                f"process {process.rank}: {self.MOST_LEFT_OUT} steps in a row were left out, and now {step}"
            )
        tqdm.write(f"process {process.rank}: a loss or its gradient is not finite, left out: {step}")
        return None

    def __str__(self) -> str:
        config, total = self.config, self.total_batch
        options = "".join(f"  {name:<18}{value}\n" for name, value in dataclasses.asdict(config).items())
        parameters = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        precision = "bf16" if self.bf16 else "float32"
        return (
            f"{options}{parameters:,} trainable parameters, {precision} on {self.process.device}\n"
            f"total batch {config.batch_size} × {self.process.world_size} = {total}, learning rate {config.lr} × "
            f"{total} / {config.LR_BATCH} = {config.learning_rate(total, 0):.3g}, {self.steps_per_epoch} steps an "
            f"epoch, {config.epochs * self.steps_per_epoch} in all"
        )


class Journal:
    """Says what the steps gave: in log.jsonl, in the progress bar, in a line an epoch, and in warnings, each once."""

    MOST_OVERLAP = 0.8  # of the two windows of a video, which are to show different moments

    def __init__(self, run: Run, folder: RunFolder, clips: int):
        self.run, self.folder, self.clips = run, folder, clips  # clips of a step, of all processes
        self.bar = progress(run.process, total=run.config.epochs * run.steps_per_epoch, initial=run.done, unit="step")
        self.meter, self.lines, self.warned = Meter(), [], set()

    def add(self, step: Step | None, waited: float) -> None:
        """Counts a step, unless it was left out, and the seconds it waited for data."""
        self.meter.waited += waited
        if step is not None:
            self.meter.steps.append(step)
        self.bar.update()

    def line(self, bad_videos: int) -> None:
        """Writes the means of the steps since the last line; raises UserError where they are not finite."""
        if not self.meter.steps:
            return
        run, count = self.run, len(self.meter.steps)
        line = {"step": run.done, "epoch": run.done / run.steps_per_epoch, "lr": run.optimizer.param_groups[0]["lr"]}
        line |= self.meter.read(run.process, self.clips) | {"bad_videos": bad_videos, "skipped_steps": run.skipped}
        with user_errors():
            self.folder.log(line)
        self.lines.append((count, line))
        self.bar.set_postfix_str(
            f"loss {line['loss']:.2f}, {line['clips_per_s']:.0f} clips/s, data wait {line['data_wait']:.0%}",
            refresh=False,  # by the next step that is due, not at every line
        )
        self.warn(self.run.method.warnings(line) if hasattr(self.run.method, "warnings") else ())

    def warn(self, warnings: Iterable[str]) -> None:
        """Says what has not been said before."""
        for warning in warnings:
            if warning not in self.warned:
                self.run.process.say(f"warning, step {self.run.done}: {warning}")
                self.warned.add(warning)

    def summary(self) -> None:
        """Prints the means of the lines since the last summary, and puts that of the windows' overlap in run.json."""
        if not self.lines:
            return
        weight, last = sum(count for count, _ in self.lines), self.lines[-1][1]
        means = {k: sum(count * line[k] for count, line in self.lines) / weight for k in last}
        unreadable = f"  {last['bad_videos']} unreadable videos" if last["bad_videos"] else ""
        skipped = f"  {last['skipped_steps']} steps left out" if last["skipped_steps"] else ""
        self.run.process.say(
            f"epoch {last['epoch']:g}/{self.run.config.epochs}  {describe(means)}  {means['clips_per_s']:.0f} clips/s  "
            f"data wait {means['data_wait']:.0%}{unreadable}{skipped}"
        )
        if "overlap" in means:
            with user_errors():
                self.folder.note(overlap=means["overlap"])
            if means["overlap"] > self.MOST_OVERLAP:
                found = f"the two windows of a video share more than {self.MOST_OVERLAP:.0%} of their frames (overlap)"
                self.warn([f"{found}: take longer videos, or a smaller --frames or --frame_stride"])
        self.lines = []

    def close(self) -> None:
        """Ends the progress bar, and TensorBoard's file."""
        self.bar.close()
        self.folder.close()


def fit(
    method: nn.Module,
    config: Config,
    process: Process,
    make_loader: Callable[[int], Iterable[dict]],
    steps_per_epoch: int,
    out: str,
    clips_per_video: int = 2,
    paths: Sequence[str] = (),
    seen: dict | None = None,
) -> Path:
    """Trains `method` and returns the path of its last checkpoint.

    Args:
        make_loader: step to start from → batches from that step on, one a step; a batch is a dict of tensors and, under
            "bad", the list of (path, reason) of videos that could not be read and were replaced. The method gets it
            with "epoch", how many of them have passed, a whole number at the start of each. "overlap" (B,), of the two
            windows of each video, is logged.
        steps_per_epoch: batches in an epoch.
        out: run folder when config names none.
        clips_per_video: of a batch, for the log's clips/s.
        paths: of the videos that a batch's "index" counts, to name those of a step that fails.
        seen: what the checkpoints are to say of the videos, on the first process (see `continued`).

    Raises:
        UserError: a checkpoint that does not fit or cannot be written, more unreadable videos than `max_bad`, or a loss
            or gradient that is not finite.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the state is saved.
    """
    out = Path(config.out or out)
    with user_errors():
        process.of_first(lambda: claim_folder(out, config.resume))  # before the checkpoint is read: none writes it now
    run = Run(method, config, process, steps_per_epoch, paths, seen)
    stop = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    if run.done >= stop:
        process.say(f"{config.resume} is at step {run.done} of {stop}: nothing left to train (--epochs, --max_steps)")
        return Path(config.resume)
    with user_errors():
        folder = RunFolder(out, config, process, run.done, steps_per_epoch)
    checkpoint = folder.path / "checkpoint.pt"
    process.say(f"{run}\nrun folder {folder.path}" + (f", resumed after step {run.done}" if config.resume else ""))
    journal, saved = Journal(run, folder, clips_per_video * run.total_batch), time.monotonic()
    with noted_signals(process) as caught, contextlib.closing(journal):
        batches, bad = iter(make_loader(run.done)), []
        while run.done < stop:
            waiting = time.perf_counter()
            with user_errors():
                batch = next(batches)
            waited = time.perf_counter() - waiting
            bad += batch.pop("bad", [])
            journal.add(run.step(batch), waited)

            ends = run.done % steps_per_epoch == 0 or run.done == stop
            line_due = ends or run.done % config.log_every == 0
            if process.world_size > 1 and not line_due and run.done % 10:
                continue  # the rest has the processes wait for each other
            late = process.rank == 0 and time.monotonic() - saved >= 60 * config.save_minutes
            run.bad_videos += len(bad)
            counts = len(caught), run.bad_videos, late, len(bad)
            interrupted, bad_videos, late, unnamed = process.sums(*counts)  # so that all do the same
            if unnamed:
                with user_errors():
                    folder.log_bad(run.done, process.gather(bad))
                bad = []
            if bad_videos > config.max_bad * steps_per_epoch * run.total_batch:
                names = str(folder.path / "bad_videos.log")
                exclude = shlex.quote(",".join(filter(None, [getattr(config, "exclude", ""), names])))
                raise UserError(
                    f"{bad_videos} videos of this epoch could not be read, more than --max_bad {config.max_bad:g}; "
                    f"{names} names them and says why: mend them, allow more, or leave them out, when resuming with "
                    f"--changed_data, by --exclude {exclude}"
                )
            if line_due or interrupted:
                journal.line(bad_videos)  # before saving, as it finds losses that are not finite
            if ends or interrupted or (late and line_due):
                run.save(folder.path, bad_videos)
                saved = time.monotonic()
            if ends or interrupted:
                journal.summary()
                run.bad_videos = run.skipped = 0
            if interrupted:
                launch = f"torchrun --nproc_per_node={process.world_size}" if process.world_size > 1 else "python"
                command = shlex.join([*_program(), "--resume", str(checkpoint)])
                process.say(f"saved; continue with: {launch} {command}")
                raise Interrupted(caught[0] if caught else signal.SIGTERM)
    return checkpoint
