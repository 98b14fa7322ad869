"""The training loop that every method shares: options, processes, optimiser, log, checkpoints, resuming.

Imports torch and tqdm only. A method is an `nn.Module` whose `forward(batch)` returns a dict of named scalar losses and
leaves numbers in `.metrics`, among them "chance/NAME", what loss NAME is at chance. `fit` sums the losses, steps, logs
and saves. What is random in a step follows from (seed, step, rank) and what is random in a sample from (seed, epoch,
index), so a checkpoint needs no random state to continue exactly.

One process needs no process group; `torchrun --nproc_per_node=N method.py …` runs N of them, one a GPU.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: `command_line` prints it as one line and exits with code 2."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, given as its number, and has saved its state."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Where only what the user asked for can raise a ValueError or OSError, makes it a UserError.

    Of an error in a loader's worker, which comes with the worker's traceback as its text, the last line is the message.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(last.removeprefix(type(error).__name__ + ": ")) from error


def command_line(main: Callable[[], None]) -> NoReturn:
    """Runs a script: a UserError is one line and exit code 2, an interrupt 128 + its signal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not fit the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Interrupted as error:
        code = 128 + error.args[0]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------- options


def option(default: Any, help: str, choices: tuple = (), least: float = -math.inf, most: float = math.inf) -> Any:
    """A field of a config dataclass, which `parse` makes a command-line flag: one of `choices`, or in [least, most]."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "range": (least, most)})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of the configs, whose fields are all made by `option`.

    Raises:
        UserError: a value that is none of the choices, out of range, or not a number.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, (least, most), value = (
                field.metadata["choices"],
                field.metadata["range"],
                getattr(self, field.name),
            )
            if choices and value not in choices:
                raise UserError(f"--{field.name} {value}: choose from {', '.join(filter(None, choices))}")
            if field.type is not str and not (least <= value <= most and math.isfinite(value)):
                limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise UserError(f"--{field.name} {value}: must be {limits}")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """What `fit` needs; a method's config inherits from it."""

    epochs: int = option(200, "passes over the data set, the length of the half-cosine schedule", least=1)
    batch_size: int = option(8, "videos a process; the total batch is this times the number of processes", least=1)
    lr: float = option(
        0.04, "learning rate at a total batch of 256, scaled linearly (0.00375 at 24, 0.01 at 64)", least=0
    )
    sgd_momentum: float = option(0.9, "momentum of SGD", least=0, most=1)
    weight_decay: float = option(1e-4, "weight decay of SGD", least=0)
    precision: str = option(
        "auto",
        "auto: bf16 autocast on GPUs that have it, from torch 2.11 on; else float32",
        ("auto", "float32", "bf16"),
    )
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    workers: int = option(
        -1, "loader processes of each training process; -1: as many as its share of CPU cores, at most 8", least=-1
    )
    seed: int = option(0, "seed of everything random", least=0, most=2**31 - 1)
    out: str = option("", "run folder (default: runs/METHOD-DATASET-TIME, or the folder of --resume)")
    resume: str = option("", "checkpoint to continue, with its options unless others are given")
    max_steps: int = option(0, "stop and save after this step of the schedule; 0: run all of it", least=0)
    log_every: int = option(10, "steps between two lines of log.jsonl", least=1)
    keep_every: int = option(0, "epochs between two checkpoints kept for good; 0: keep the latest only", least=0)
    max_bad: float = option(0.05, "stop when more than this share of an epoch's videos cannot be read", least=0, most=1)

    LR_BATCH = 256  # total batch at which `lr` holds

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parse(
    config_class: type[Config], doc: str, presets: dict[str, dict] | None = None, argv: list[str] | None = None
) -> Config:
    """Command line → config. Explicit flags win over the options of the checkpoint to resume, these over the preset
    that `--dataset` selects, and this over the defaults. Flags may be written with underscores or hyphens.

    Raises:
        UserError: unknown flag or value, no such checkpoint, or one of another method.
    """
    presets = presets or {}
    parser = _Parser(
        " ".join(_program()), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(config_class):
        names = dict.fromkeys(["--" + field.name, "--" + field.name.replace("_", "-")])
        shown = "" if field.default == "" else f" (default: {field.default})"
        options = {"choices": field.metadata["choices"] or None, "metavar": field.type.__name__.upper()}
        if options["choices"]:
            options["metavar"] = "|".join(map(str, options["choices"]))
        parser.add_argument(
            *names,
            type=field.type,
            default=argparse.SUPPRESS,
            help=(field.metadata["help"] + shown).replace("%", "%%"),
            **options,
        )
    lines = [f"  {name}: " + " ".join(f"--{k} {v}" for k, v in preset.items()) for name, preset in presets.items()]
    parser.epilog = "\n".join(["what --dataset NAME sets (explicit flags win):", *lines]) if lines else None
    given = vars(parser.parse_args(argv))
    saved = {}
    if given.get("resume"):
        own = {field.name for field in dataclasses.fields(config_class)} - {"out", "resume", "max_steps"}
        state, method = load_checkpoint(given["resume"]), _method_name(config_class)
        if state["method"] != method:
            raise UserError(f"{given['resume']} is a checkpoint of {state['method']}, not of {method}")
        saved = {k: v for k, v in state["config"].items() if k in own}
        given.setdefault("out", str(Path(given["resume"]).parent))
    dataset = given.get("dataset", saved.get("dataset", getattr(config_class, "dataset", "")))
    return config_class(**presets.get(dataset, {}) | saved | given)


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

    def of_first(self, value: str) -> str:
        """The first process's value, on every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

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


def start_process(device: str = "auto") -> Process:
    """Joins the run that torchrun's environment describes, or stands alone without it.

    Raises:
        UserError: CUDA asked for where there is none, or more processes than GPUs.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
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
        torch.backends.cudnn.benchmark = True  # shapes stay the same: let it look for the fastest convolutions
    else:
        raise UserError(f"process {local_rank} has no GPU: {torch.cuda.device_count()} here; lower --nproc_per_node")
    if world_size > 1 and not dist.is_initialized():
        if place.type == "cuda":
            dist.init_process_group("nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
    return Process(int(os.environ.get("RANK", 0)), world_size, place)


def loader_workers(config: TrainConfig, process: Process) -> int:
    """Number of loader processes: `--workers`, or this process's share of the CPU cores, at most 8."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.workers if config.workers >= 0 else min(8, max(1, cores // local))


def leave_signals(_worker: int) -> None:
    """Takes a loader's worker out of the process group, which a terminal's Ctrl-C and a launcher's SIGTERM reach whole.

    The training process decides, and needs its workers until it has saved.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def average_batch_norm(model: nn.Module) -> None:
    """Averages the running statistics of batch norm, the one thing in which the processes differ, over them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:  # a frozen one stays bit for bit
            for statistic in (module.running_mean, module.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()


# ------------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes atomically: at every moment `path` holds the old state or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of `fit`: method, config, model, optimizer, step, steps_per_epoch, world_size; runs no code in it.

    Raises:
        UserError: no such file, or not a checkpoint of this project.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers meet: pickle, zip, runtime and end-of-file errors
        raise UserError(f"{path} is damaged, or no checkpoint, or holds code, which is never run") from error
    expected = {"method", "config", "model", "optimizer", "step", "steps_per_epoch", "world_size"}
    if not isinstance(state, dict) or not expected <= state.keys():
        raise UserError(f"{path} is no checkpoint of this project: it lacks some of {', '.join(sorted(expected))}")
    return state


def restore(
    path: str,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    process: Process,
    steps_per_epoch: int,
) -> int:
    """Loads a checkpoint into method and optimiser, and returns the step to go on from.

    Where an epoch has other steps than it had, by another batch, data set or number of processes, this is the same
    place in the schedule, and the run says so.

    Raises:
        UserError: it is of another architecture.
    """
    state = load_checkpoint(path)
    try:
        method.load_state_dict(state["model"])
    except RuntimeError as error:
        asked = dataclasses.asdict(config)
        changed = [f"{k} {v} (here {asked.get(k)})" for k, v in state["config"].items() if asked.get(k) != v]
        raise UserError(f"{path} does not fit this model; it was made with {', '.join(changed)}") from error
    optimizer.load_state_dict(state["optimizer"])
    step, before = state["step"], state["steps_per_epoch"]
    if (before, state["world_size"]) != (steps_per_epoch, process.world_size):
        step = round(step * steps_per_epoch / before)
        process.say(
            f"note: {path} was saved by {state['world_size']} processes with {before} steps an epoch, now it is "
            f"{process.world_size} with {steps_per_epoch}: goes on at the same part of the schedule, with other batches"
        )
    return step


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


def _replace(path: Path, text: str) -> None:
    """Writes a small file so that it is never seen half-written."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _step_of(line: str) -> float:
    """Step of a line of log.jsonl; infinite for one that a kill has cut."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class RunFolder:
    """config, command, commit and versions in run.json; numbers in log.jsonl; unreadable videos in bad_videos.log.

    Only the first process writes the first two, and TensorBoard's events where it is installed.
    """

    def __init__(self, path: Path, config: TrainConfig, process: Process, start_step: int):
        self.path, self.writes = path, process.rank == 0
        self.board = None
        path.mkdir(parents=True, exist_ok=True)
        if not self.writes:
            return
        record, log = path / "run.json", path / "log.jsonl"
        if start_step == 0 and (path / "checkpoint.pt").exists():
            raise UserError(f"{path} holds a run already: continue it with --resume, or name another --out")
        starts = json.loads(record.read_text()) if record.exists() else []
        starts.append(
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
        _replace(record, json.dumps(starts, indent=1) + "\n")
        kept = [line for line in log.read_text().splitlines() if _step_of(line) <= start_step] if log.exists() else []
        _replace(log, "".join(line + "\n" for line in kept))  # what came after the checkpoint comes again
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path), purge_step=start_step + 1)

    def log(self, record: dict[str, float]) -> None:
        """Appends one line of numbers."""
        if self.writes:
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])

    def log_bad(self, step: int, bad: list[tuple[str, str]]) -> None:
        """Names the videos that could not be read in this process's batch of a step, and why."""
        if bad:
            with open(self.path / "bad_videos.log", "a") as file:
                file.writelines(f"step {step}\t{path!r}\t{reason}\n" for path, reason in bad)

    def close(self) -> None:
        """Writes what TensorBoard still holds back."""
        if self.board is not None:
            self.board.close()


class Meter:
    """Means of numbers between two lines of the log; waits for the device only when they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def add(self, numbers: dict[str, Tensor | float], waited: float) -> None:
        """Counts one step's numbers, and the seconds it waited for data."""
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)
        self.steps += 1
        self.waited += waited

    def read(self, process: Process, clips: int) -> dict[str, float]:
        """Means over steps and processes, clips/s of the whole run, share of time spent waiting for data; resets."""
        values = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=process.device) for v in self.sums.values()]
        )
        if process.world_size > 1:
            dist.all_reduce(values)
        means = dict(zip(self.sums, (values / (self.steps * process.world_size)).tolist(), strict=True))
        elapsed = time.perf_counter() - self.since
        means |= {"clips_per_s": clips * self.steps / elapsed, "data_wait": self.waited / elapsed}
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
    return config.precision == "bf16" or (config.precision == "auto" and recent and torch.cuda.is_bf16_supported())


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


def describe(losses: dict[str, float]) -> str:
    """ "vv 5.02 (chance 5.55)  pix …" of one line of the log, or of means of them."""
    names = [name.removeprefix("loss/") for name in losses if name.startswith("loss/")]
    return "  ".join(f"{name} {losses['loss/' + name]:.3f} (chance {losses['chance/' + name]:.3f})" for name in names)


def fit(
    method: nn.Module,
    config: Config,
    process: Process,
    make_loader: Callable[[int], Iterable[dict]],
    steps_per_epoch: int,
    out: str,
    clips_per_video: int = 2,
) -> Path:
    """Trains `method` and returns the path of its last checkpoint.

    Args:
        make_loader: step to start from → batches from that step on, one a step; a batch is a dict of tensors and, under
            "bad", the list of (path, reason) of videos that could not be read and were replaced.
        steps_per_epoch: batches in an epoch.
        out: run folder when config names none.
        clips_per_video: of a batch, for the log's clips/s.

    Raises:
        UserError: a checkpoint that does not fit, more unreadable videos than `max_bad`, or a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    method.to(process.device).train()
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, config.lr, config.sgd_momentum, weight_decay=config.weight_decay)
    start = restore(config.resume, method, optimizer, config, process, steps_per_epoch) if config.resume else 0
    steps = config.epochs * steps_per_epoch
    stop = min(steps, config.max_steps or steps)
    total_batch = config.batch_size * process.world_size
    bf16 = autocast_bf16(config, process)
    if start >= stop:
        process.say(f"{config.resume} is at step {start} of {stop}: nothing left to train (--epochs, --max_steps)")
        return Path(config.resume)
    with user_errors():
        folder = RunFolder(Path(process.of_first(config.out or out)), config, process, start)
    checkpoint = folder.path / "checkpoint.pt"
    process.say("\n".join(f"  {name:<18}{value}" for name, value in dataclasses.asdict(config).items()))
    parameters = sum(p.numel() for p in trainable)
    process.say(
        f"{parameters:,} trainable parameters, {'bf16' if bf16 else 'float32'} on {process.device}\n"
        f"total batch {config.batch_size} × {process.world_size} = {total_batch}, learning rate {config.lr} × "
        f"{total_batch} / {config.LR_BATCH} = {config.learning_rate(total_batch, 0):.3g}, {steps_per_epoch} steps an "
        f"epoch, {steps} in all\n"
        f"run folder {folder.path}" + (f", resumed after step {start}" if config.resume else "")
    )

    def save(step: int) -> None:
        if process.world_size > 1:
            average_batch_norm(method)
        if process.rank == 0:
            state = {
                "method": _method_name(type(config)),
                "config": dataclasses.asdict(config),
                "model": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "steps_per_epoch": steps_per_epoch,
                "world_size": process.world_size,
                "versions": versions(),
            }
            save_checkpoint(checkpoint, state)
            epoch = step / steps_per_epoch
            if config.keep_every and epoch % config.keep_every == 0:
                save_checkpoint(folder.path / f"epoch_{int(epoch):04d}.pt", state)
        if process.world_size > 1:
            dist.barrier()

    model = method
    if process.world_size > 1:  # batch-norm statistics are each process's own; `save` averages them
        model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)
    caught: list[int] = []

    def note_signal(number: int, _frame: Any) -> None:
        if caught:  # the second time, at once
            raise KeyboardInterrupt
        caught.append(number)
        process.say("stopping after this step, to save; once more to stop without saving")

    handlers = {number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    copies = torch.cuda.Stream() if process.device.type == "cuda" else None
    bar = progress(process, total=steps, initial=start, unit="step")
    meter, epoch_lines, bad_here = Meter(), [], 0
    try:
        batches = iter(make_loader(start))
        for step in range(start, stop):
            waiting = time.perf_counter()
            with user_errors():
                batch = next(batches)
            waited = time.perf_counter() - waiting
            bad = batch.pop("bad", [])
            folder.log_bad(step, bad)
            bad_here += len(bad)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(total_batch, step / steps_per_epoch)
            torch.manual_seed((config.seed * 1_000_003 + step) * 65_537 + process.rank)
            batch = to_device(batch, process.device, copies)
            with torch.autocast(process.device.type, torch.bfloat16, enabled=bf16):
                losses = model(batch)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            meter.add({"loss": loss} | {f"loss/{k}": v for k, v in losses.items()} | method.metrics, waited)

            done, epoch_ends = step + 1, (step + 1) % steps_per_epoch == 0
            bar.update()
            interrupted = False
            if process.world_size == 1 or done % min(config.log_every, 10) == 0 or epoch_ends or done == stop:
                interrupted, bad_in_epoch = process.sums(len(caught), bad_here)  # so that all stop after the same step
                if bad_in_epoch > config.max_bad * steps_per_epoch * total_batch:
                    raise UserError(
                        f"{bad_in_epoch} videos of this epoch could not be read, more than --max_bad "
                        f"{config.max_bad:g} of it; {folder.path / 'bad_videos.log'} names them and says why"
                    )
            if done % config.log_every == 0 or epoch_ends or done == stop or interrupted:
                count = meter.steps
                line = meter.read(process, clips_per_video * total_batch)
                if not math.isfinite(line["loss"]):
                    raise UserError(
                        f"the loss is not finite by step {done}: {describe(line)}; {checkpoint} holds the end of the "
                        "last epoch, if there was one; try a lower --lr, or --precision float32"
                    )
                line = {"step": done, "epoch": done / steps_per_epoch, "lr": group["lr"]} | line
                folder.log(line | {"bad_videos": bad_in_epoch})
                epoch_lines.append((count, line))
                bar.set_postfix_str(
                    f"loss {line['loss']:.2f}, {line['clips_per_s']:.0f} clips/s, data wait {line['data_wait']:.0%}"
                )
            if epoch_ends or done == stop or interrupted:
                save(done)
                weight = sum(count for count, _ in epoch_lines)
                means = {k: sum(count * line[k] for count, line in epoch_lines) / weight for k in line}
                unreadable = f"  {bad_in_epoch} unreadable videos" if bad_in_epoch else ""
                process.say(
                    f"epoch {done / steps_per_epoch:g}/{config.epochs}  {describe(means)}  "
                    f"{means['clips_per_s']:.0f} clips/s  data wait {means['data_wait']:.0%}{unreadable}"
                )
                epoch_lines, bad_here = [], 0
            if interrupted:
                launch = f"torchrun --nproc_per_node={process.world_size}" if process.world_size > 1 else "python"
                command = shlex.join([*_program(), "--resume", str(checkpoint)])
                process.say(f"saved; continue with: {launch} {command}")
                raise Interrupted(caught[0] if caught else signal.SIGTERM)
    finally:
        bar.close()
        folder.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return checkpoint
