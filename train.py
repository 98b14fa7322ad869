"""The training loop that every method shares: options, optimiser, several processes, log, checkpoints, resuming.

Imports torch and tqdm only. `fit` sums a method's losses, steps, logs and saves. What is random in a step follows from
(seed, step, rank) and in a sample from (seed, epoch, index), so a checkpoint needs no random state to continue exactly.
A method is an `nn.Module`, of which only `forward` is a must:

- `forward(batch)` returns a dict of named scalar losses, of the same names in every step.
- `metrics`: a dict of numbers, or tensors of one, to log, which `forward` fills; emptied before each call. What some
  calls lack is averaged over the others. "chance/NAME", what loss NAME is at chance, is shown beside it.
- `part`, set before each call: (i, N) for micro-batch i, from 0 on, of the N of a step (`config.accumulate`), whose
  gradients are averaged. What a method does once a step, it does in the first or in the last call.
- `warnings(line)`: a line of the log → texts on what it shows to be wrong, each said once. It lacks what no step gave.
- `optimizer(config)`: any `torch.optim.Optimizer`, instead of `sgd`; resuming restores its state exactly.

The learning rate is `config.learning_rate`, set before each step: a config may have another rule.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

HANGUP = getattr(signal, "SIGHUP", 0)  # Windows has none
SWITCH = ("off", "on")  # choices of an option whose flag alone means "on"
Config = TypeVar("Config", bound="Options")


class UserError(Exception):
    """Something the user can mend: `cli.command_line` prints it as one line and exits with code 2."""


class Interrupted(Exception):
    """The run was asked to stop by a signal, given as its number, and has saved its state."""


@contextlib.contextmanager
def user_errors(kinds: tuple = (ValueError, OSError), path: str | Path | None = None) -> Iterator[None]:
    """Makes exceptions of these kinds a UserError, for places where only what the user asked for can raise them. An
    OSError that names no file, as that of a full disk, gets the path of what is written."""
    try:
        yield
    except kinds as error:
        if path and isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)
        raise UserError(str(error).strip() or type(error).__name__) from error


def option(default: Any, help: str, allowed: tuple = (), detail: bool = False) -> Any:
    """A field of a config dataclass, which `parse` makes a command-line flag.

    Args:
        allowed: of a text, the choices, if not any is; of a number, which needs them, the least and the greatest.
        detail: --help leaves it out, --help-all has it.
    """
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed, "detail": detail})


detail = functools.partial(option, detail=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of the configs, whose fields are all made by `option`. Raises UserError as `check_option` does."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_option(field, getattr(self, field.name))

    def __str__(self) -> str:
        """All options as flags, one a line, with the default where it is another."""
        values = {field: getattr(self, field.name) for field in dataclasses.fields(self)}
        notes = {field: f"  # default: {field.default!r}" * (value != field.default) for field, value in values.items()}
        return "\n".join(f"--{field.name} {shlex.quote(str(value))}{notes[field]}" for field, value in values.items())


def check_option(field: dataclasses.Field, value: Any, where: str = "") -> None:
    """Raises UserError for a value of another type than the field's, none of its choices, or out of its range."""
    kind, allowed = field.type, field.metadata["allowed"]
    good = type(value) in ((int, float) if kind is float else (kind,))
    if good and allowed:
        good = value in allowed if kind is str else allowed[0] <= value <= allowed[1]  # nan is not
    if not good:
        shown = value if isinstance(value, int | float | str) else f"of type {type(value).__name__}"
        raise UserError(f"{where}--{field.name} {shown}: must be {allowed_text(field) or 'a text'}")


def allowed_text(field: dataclasses.Field) -> str:
    """ "0 to 1e+06" of the least and the greatest number, "off|on" of choices, "" where any text is allowed."""
    if field.type is str:
        return "|".join(filter(None, field.metadata["allowed"]))
    return " to ".join(str(limit) if isinstance(limit, int) else f"{limit:g}" for limit in field.metadata["allowed"])


@dataclasses.dataclass(frozen=True)
class TrainConfig(Options):
    """What `fit` needs; a method's config inherits from it."""

    HEADING = "run"  # in --help
    epochs: int = option(200, "passes over the data set, the length of the half-cosine schedule", (1, 10**6))
    batch_size: int = option(8, "videos of a micro-batch; total batch: times --accumulate and processes", (1, 65_536))
    accumulate: int = option(1, "micro-batches a step, whose gradients are averaged; saves memory", (1, 65_536))
    lr: float = option(0.04, "learning rate at a total batch of 256, scaled linearly (0.00375 at 24)", (0, 1e6))
    sgd_momentum: float = detail(0.9, "momentum of SGD", (0, 1))
    weight_decay: float = detail(1e-4, "weight decay of SGD", (0, 1000))
    precision: str = option("auto", "auto: bf16 on GPUs that have it, from torch 2.11 on", ("auto", "float32", "bf16"))
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    workers: int = option(-1, "loader processes of each process; -1: its share of the CPU cores, at most 8", (-1, 1024))
    seed: int = option(0, "seed of everything random", (0, 2**31 - 1))
    out: str = option("", "run folder (default: runs/METHOD-DATASET-TIME, or the folder of --resume)")
    resume: str = option("", "checkpoint to continue; auto: the one of most epochs with these options and videos")
    changed_data: str = detail("off", "resume although the videos, their labels or sizes have changed", SWITCH)
    max_steps: int = detail(0, "stop and save after this step of the schedule; 0: run all of it", (0, 2**31 - 1))
    log_every: int = detail(10, "steps between two lines of log.jsonl", (1, 10**6))
    keep_every: int = detail(0, "epochs between two checkpoints kept for good; 0: keep the latest only", (0, 10**6))
    save_minutes: float = detail(30.0, "minutes after which a line of the log comes with a checkpoint, too", (0, 1e6))
    on_nan: str = detail("stop", "at a loss or gradient not finite: stop, or skip the step (slower)", ("stop", "skip"))
    deterministic: str = detail("off", "deterministic algorithms on a GPU, too, where torch has them; slower", SWITCH)
    timeout: float = detail(10.0, "minutes after which a process gives up waiting for another one", (0.01, 1e6))
    max_bad: float = detail(0.05, "stop when more than this share of an epoch's videos cannot be read", (0, 1))

    LR_BATCH = 256  # total batch at which `lr` holds
    # What resuming may change, FREE for what defines no run, TUNED for what does; another of the rest is another run.
    FREE = {"precision", "device", "workers", "out", "resume", "changed_data", "max_steps", "log_every", "keep_every"}
    FREE |= {"save_minutes", "on_nan", "deterministic", "timeout", "max_bad"}
    TUNED = {"epochs", "batch_size", "accumulate", "lr", "sgd_momentum", "weight_decay"}

    def learning_rate(self, total_batch: int, epoch: float) -> float:
        """Half-period cosine per step from the linearly scaled rate (Goyal et al. 2017; FIMA Sec. 4.1)."""
        return self.lr * total_batch / self.LR_BATCH * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


def method_name(config_class: type[Options]) -> str:
    """What a checkpoint is said to be of: FIMA for FIMAConfig."""
    return config_class.__name__.removesuffix("Config")


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

    def first(self, function: Callable[[], Any], mark: Callable[[Any], Any] = lambda _: None) -> Any:
        """What a function gives on this process. The first process runs it before the others do, so that it alone makes
        what is made once. What it raises for the user on one process ends all, as does a mark of what it gives, which
        is to be the same on all: on nodes without a common disk, data may be missing or differ."""
        given, error = None, None
        if self.rank > 0:
            dist.barrier()
        try:
            given = function()
        except (UserError, ValueError, OSError) as raised:
            error = raised
        if self.rank == 0 and self.world_size > 1:
            dist.barrier()
        outcomes = self.gather([(error and (str(error) or repr(error)), None if error else mark(given))])
        if error:
            raise error
        for rank, (wrong, found) in enumerate(outcomes):
            if wrong or found != outcomes[0][1]:
                raise UserError(f"process {rank}: {wrong or f'{found}, but process 0: {outcomes[0][1]}'}")
        return given

    def of_first(self, function: Callable[[], Any]) -> Any:
        """What a function gives, or raises for the user, on the first process; on every process."""
        given = [self.first(lambda: function() if self.rank == 0 else None)]
        if self.world_size > 1:
            dist.broadcast_object_list(given)
        return given[0]

    def gather(self, entries: list) -> list:
        """The entries of all processes, on each."""
        shares = [entries] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(shares, entries)
        return [entry for share in shares for entry in share]


def progress(process: Process, *arguments: Any, **options: Any) -> tqdm:
    """A progress bar with ETA on the first process, drawn twice a second in a terminal, twice a minute in a file."""
    pause = 0.5 if sys.stderr.isatty() else 30
    return tqdm(*arguments, disable=process.rank > 0, dynamic_ncols=True, mininterval=pause, **options)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Writes a file atomically: at every moment it holds the old content or the new, whole. A link stays one. Raises
    OSError where it cannot, as on a full disk, and leaves nothing half."""
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


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a checkpoint by `write_file`; raises UserError where it cannot be written, and `path` is as it was."""
    buffer = io.BytesIO()
    torch.save(state, buffer)  # in memory, as torch.save hides why a file cannot be written
    with user_errors((OSError,)):
        write_file(path, buffer.getbuffer())


def load_model(path: str | Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads the tensors of a checkpoint; raises UserError where they are not those of the model."""
    held, wanted = (
        {name: (*value.shape, value.dtype, value.layout) for name, value in tensors.items()}
        for tensors in (state, model.state_dict())
    )
    if wrong := [name for name in wanted | held if held.get(name) != wanted.get(name)]:
        raise UserError(f"{path} does not fit this model: {len(wrong)} tensors differ, as {wrong[0]}")
    model.load_state_dict(state)


def load_optimizer(path: str | Path, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads what an optimiser has kept of each parameter; its groups keep the options of now. Raises UserError where
    something in it is no tensor or, of SGD and Adam, neither of the parameter's shape nor a count of steps, and where
    it is of an optimiser of another class."""
    shapes = dict(enumerate(p.shape for group in optimizer.param_groups for p in group["params"]))
    try:
        kept = state["state"].items()
        values = [(i, value) for i, entry in kept for value in entry.values()]
        alike = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW)  # not Adafactor
        good = all(v.layout == torch.strided and (v.shape in ((), shapes[i]) or not alike) for i, v in values)
        good &= all(type(i) is int for i, _ in kept)
        good &= not alike or len({frozenset(entry) for _, entry in kept}) <= 1
    except (AttributeError, KeyError, RuntimeError, TypeError):
        good = False
    if not good:
        raise UserError(f"{path} is damaged, or of other code: no valid optimizer in it")
    if (was := state.get("class", now := type(optimizer).__name__)) != now:
        raise UserError(f"{path} was trained with {was}, not with {now}: start anew, without --resume")
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def check_sums(module: nn.Module) -> dict[str, int]:
    """Of each tensor of a module's state."""
    state = module.state_dict().items()
    return {name: zlib.crc32(v.cpu().contiguous().flatten().view(torch.uint8).numpy()) for name, v in state}


def describe(numbers: dict[str, Tensor | float]) -> str:
    """ "vv 5.02 (chance 5.55)  pix …" of the numbers of a step, or of a line of the log."""
    parts = []
    for name in (key.removeprefix("loss/") for key in numbers if key.startswith("loss/")):
        chance = f" (chance {float(numbers[f'chance/{name}']):.3f})" if f"chance/{name}" in numbers else ""
        parts.append(f"{name} {float(numbers[f'loss/{name}']):.3f}{chance}")
    return "  ".join(parts)


def mean(weighted: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Weighted means by name, each over those that have it."""
    found = {}
    for name in dict.fromkeys(name for _, numbers in weighted for name in numbers):
        having = [(weight, numbers[name]) for weight, numbers in weighted if name in numbers]
        found[name] = sum(weight * value for weight, value in having) / sum(weight for weight, _ in having)
    return found


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step gave on this process: its number (from 1), numbers, and the videos in its batch."""

    number: int
    numbers: dict[str, Tensor | float]
    videos: list[str]

    def is_finite(self) -> bool:
        """Whether the loss and the norm of its gradient are; waits for the device."""
        return all(math.isfinite(self.numbers[name]) for name in ("loss", "grad_norm"))

    def __str__(self) -> str:
        norm = float(self.numbers["grad_norm"])
        return f"step {self.number}: {describe(self.numbers)}  norm of the gradient {norm:.3g}; videos {self.videos}"


class Log:
    """What a run says and keeps in its folder: a line an epoch, warnings, each once, log.jsonl and bad_videos.log. Only
    the first process writes, and raises UserError where it can't. `clips` are those of a step, of all processes."""

    def __init__(self, run: "Run", folder: Path, clips: int):
        self.run, self.folder, self.clips = run, folder, clips
        self.steps: list[Step] = []  # since the last line, until when nobody waits for the device
        self.lines: list[tuple[int, dict[str, float]]] = []  # since the last summary: number of steps, means
        self.waited, self.since, self.warned = 0.0, time.perf_counter(), set()
        self.making = torch.zeros(3)  # seconds in which this process's loader read files, decoded, and scaled crops
        self.bar = progress(run.process, total=run.stop, initial=run.done, unit="step")

    def add_bad(self, bad: list[tuple[str, str]]) -> None:
        """Names videos that could not be read, and why, each once."""
        path = self.folder / "bad_videos.log"
        if bad and self.run.process.rank == 0:
            with user_errors((OSError,), path), open(path, "a+", encoding="utf-8", errors="backslashreplace") as file:
                file.seek(0)
                named, step = file.read(), self.run.done
                lines = {path: f"step {step}\t{path!r}\t{reason}".splitlines()[0] + "\n" for path, reason in bad}
                file.writelines(line for path, line in lines.items() if f"\t{path!r}\t" not in named)

    def line(self) -> None:
        """Logs the means since the last line over steps and processes, clips/s of the whole run, and the share of time
        spent waiting for data; says what the method warns of. Raises UserError where a loss or gradient is not finite,
        in this process or in another."""
        run, count = self.run, len(self.steps)
        if not count:
            return
        held = [value for step in self.steps for value in step.numbers.values() if isinstance(value, Tensor)]
        values = iter(torch.stack([v.to(run.process.device, torch.float64).reshape(()) for v in held]).tolist())
        numbers = [{k: next(values) if isinstance(v, Tensor) else v for k, v in s.numbers.items()} for s in self.steps]
        means = mean([(1, step) for step in run.process.gather(numbers)])
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            broken = next((step for step in self.steps if not step.is_finite()), "in another process")
            advice = "try a lower --lr, --precision float32, or --on_nan skip"
            raise UserError(f"process {run.process.rank}: a loss or its gradient is not finite, {broken}; {advice}")
        seconds = time.perf_counter() - self.since
        line = {"step": run.done, "epoch": run.done / run.steps_per_epoch, "lr": run.optimizer.param_groups[0]["lr"]}
        line |= means | {"clips_per_s": self.clips * count / seconds, "data_wait": self.waited / seconds}
        line |= {"bad_videos": run.bad_videos, "skipped_steps": run.skipped}
        self.lines.append((count, line))
        self.steps, self.waited, self.since = [], 0.0, self.since + seconds
        if run.process.rank == 0:
            path = self.folder / "log.jsonl"
            with user_errors((OSError,), path), open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        shown = f"loss {line['loss']:.2f}, {line['clips_per_s']:.0f} clips/s, data wait {line['data_wait']:.0%}"
        self.bar.set_postfix_str(shown, refresh=False)  # by the next step that is due, not at every line
        if line["data_wait"] > 0.2 and line["epoch"] <= 1 < len(self.lines):  # the first line has the workers' start
            self.advise(line["data_wait"])
        for warning in run.method.warnings(line) if hasattr(run.method, "warnings") else ():
            if warning not in self.warned:
                run.process.say(f"warning, step {run.done}: {warning}")
                self.warned.add(warning)

    def advise(self, wait: float) -> None:
        """Says, once, what a loader that tells its "seconds" takes so long for, and what to do."""
        if self.making.any() and "loader" not in self.warned:
            shares = zip(self.making / self.making.sum(), ("reading files", "decoding", "scaling"), strict=True)
            took = ", ".join(f"{share:.0%} {name}" for share, name in sorted(shares, reverse=True))
            self.run.process.say(
                f"data wait {wait:.0%}, as the loader is slow ({took}): take more --workers if cores are idle, or make "
                "the videos smaller, with more key frames: python examples/shrink.py DATA OUT"
            )
            self.warned.add("loader")

    def summary(self) -> None:
        """Prints the means of the lines since the last summary."""
        if self.lines:
            last, means = self.lines[-1][1], mean(self.lines)
            text = f"epoch {last['epoch']:g}/{self.run.config.epochs}  {describe(means)}  {means['clips_per_s']:.0f} "
            text += f"clips/s  data wait {means['data_wait']:.0%}"
            text += f"  {last['bad_videos']} unreadable videos" * (last["bad_videos"] > 0)
            self.run.process.say(text + f"  {last['skipped_steps']} steps left out" * (last["skipped_steps"] > 0))
        self.lines = []


def autocast_bf16(config: TrainConfig, process: Process) -> bool:
    """Whether to run in bf16; 3-D convolutions in it are slow or wrong in the cuDNN of older torch. Raises UserError
    where it is asked for on a CPU, where the weight gradient of torch's conv3d is wrong under autocast."""
    on_gpu = process.device.type == "cuda"
    if config.precision == "bf16" and not on_gpu:
        raise UserError("--precision bf16 needs a GPU: on a CPU, torch's 3-D convolutions get wrong gradients")
    good = on_gpu and torch.__version__ >= (2, 11) and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bf16" or (config.precision == "auto" and good)


def to_device(batch: dict[str, Tensor], device: torch.device, stream: "torch.cuda.Stream | None") -> dict:
    """A batch of tensors on the device; when `stream`, if any, is done, the loader may use their memory again. On
    a GPU the copies run in that stream, while the step before, launched and not awaited, still computes."""
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    if stream is not None:
        current = torch.cuda.current_stream()
        current.wait_stream(stream)
        for value in batch.values():
            value.record_stream(current)  # not to be freed before this stream is done with it
    return batch


@contextlib.contextmanager
def noted_signals(process: Process) -> Iterator[list[int]]:
    """Has SIGINT, SIGTERM and, unless it is ignored, SIGHUP noted in a list, to be obeyed when it suits.

    A second one is obeyed at once, but for SIGHUP: each stream of a terminal that is gone raises it. Under torchrun no
    second one is: it hands on what a scheduler has sent to all processes, and kills those that take too long.
    """
    caught, own, launched = [], os.getpid(), "TORCHELASTIC_RUN_ID" in os.environ

    def note(number: int, _frame: Any) -> None:
        again = caught and number != HANGUP and not launched
        if os.getpid() != own or again:  # a process forked from this one is to end at once
            raise KeyboardInterrupt
        caught.append(number)
        if len(caught) == 1:  # to say it may raise a SIGHUP
            process.say("stopping after this step, to save" + "; once more to stop without saving" * (not launched))

    hangup = [HANGUP] if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN else []
    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def sgd(method: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a method that makes none of its own: SGD with momentum, of all that is trainable."""
    trainable = [p for p in method.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, config.lr, config.sgd_momentum, weight_decay=config.weight_decay)


class Run:
    """A method in training: its optimiser and place in the schedule, which moves on, is saved and restored.
    `steps_per_epoch` counts batches; `state` is the dict of the checkpoint `config.resume`, to go on from."""

    MOST_LEFT_OUT = 10  # steps in a row; with more, --on_nan skip stops the run, too

    def __init__(self, method: nn.Module, config: Config, process: Process, steps_per_epoch: int, state=None):
        self.method, self.config, self.process = method.to(process.device).train(), config, process
        self.steps_per_epoch, self.done = steps_per_epoch, 0  # done: steps
        self.total_batch = config.batch_size * config.accumulate * process.world_size
        self.optimizer = method.optimizer(config) if hasattr(method, "optimizer") else sgd(method, config)
        self.stop = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
        self.bad_videos = self.skipped = 0  # of this epoch: unreadable videos in all processes, steps left out
        self.skipped_in_a_row = 0
        if state is not None:
            self.restore(state)
        self.bf16 = autocast_bf16(config, process)
        self.copies = torch.cuda.Stream() if process.device.type == "cuda" else None
        self.model = method
        if process.world_size > 1:  # batch-norm statistics are each process's own; `save` averages them
            self.check_agreement()
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.6 has no other name for it
                self.model = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)

    def restore(self, state: dict) -> None:
        """Goes to where a checkpoint was saved. Where an epoch has other steps than it had, by another batch, data set
        or number of processes, this is the same place in the schedule, and the run says so."""
        process, path = self.process, self.config.resume
        load_model(path, self.method, state["model"])
        load_optimizer(path, self.optimizer, state["optimizer"])
        self.done, before = state["step"], state["steps_per_epoch"]
        if (before, state["world_size"]) != (self.steps_per_epoch, process.world_size):
            self.done = round(self.done * self.steps_per_epoch / before)
            was = f"{state['world_size']} processes with {before} steps an epoch"
            now = f"now it is {process.world_size} with {self.steps_per_epoch}"
            process.say(f"note: {path} was saved by {was}, {now}: goes on at the same part of the schedule")
        elif self.done % before:
            self.skipped, self.bad_videos = state["skipped_steps"], state["bad_videos"]

    def check_agreement(self) -> None:
        """Compares check sums of weights, queues and statistics over the processes; raises UserError if they differ."""
        sums = {"the step": self.done} | check_sums(self.method)
        others = self.process.gather([sums])
        if differing := [name for name in sums if any(other[name] != sums[name] for other in others)]:
            where = f"process {self.process.rank}: after step {self.done} the processes hold different values of"
            raise UserError(f"{where} {differing[0]}, and of {len(differing) - 1} more")

    def save(self, folder: Path, extra: dict) -> None:
        """Writes checkpoint.pt, with extra entries, and epoch_N.pt where one is due. Running statistics of batch norm,
        the one thing in which the processes differ, are averaged over them before. Raises UserError where a file can't
        be written, or the processes differ."""
        process, config = self.process, self.config
        if process.world_size > 1:
            for module in self.method.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:  # frozen ones stay as is
                    for statistic in (module.running_mean, module.running_var):
                        dist.all_reduce(statistic)
                        statistic /= process.world_size
            self.check_agreement()
        if process.rank == 0:
            state = {"method": method_name(type(config)), "config": dataclasses.asdict(config)}
            kept = self.optimizer.state_dict() | {"class": type(self.optimizer).__name__}
            state |= {"model": self.method.state_dict(), "optimizer": kept}
            state |= {"step": self.done, "steps_per_epoch": self.steps_per_epoch, "skipped_steps": self.skipped}
            state |= {"bad_videos": self.bad_videos, "world_size": process.world_size} | extra
            epoch, rest = divmod(self.done, self.steps_per_epoch)
            if config.keep_every and rest == 0 and epoch % config.keep_every == 0:
                save_checkpoint(folder / f"epoch_{epoch:04d}.pt", state)
            save_checkpoint(folder / "checkpoint.pt", state)  # last: who is killed between makes both again
        if process.world_size > 1:
            dist.barrier()

    def step(self, batch: dict, videos: list[str] = ()) -> Step | None:
        """Trains on a batch of these videos, cut in micro-batches; None where `on_nan` has the step left out. Raises
        UserError where too many in a row would be."""
        config, process, method, count = self.config, self.process, self.method, self.config.accumulate
        before = copy.deepcopy(method.state_dict()) if config.on_nan == "skip" else None
        epoch = self.done / self.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.total_batch, epoch)
        seed = ((config.seed * 1_000_003 + self.done) * 65_537 + process.rank) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device: half of a short step
        if process.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        self.optimizer.zero_grad(set_to_none=True)
        found, cut = [], {name: value.chunk(count) for name, value in batch.items()}
        for i in range(count):
            part = to_device({name: values[i] for name, values in cut.items()}, process.device, self.copies)
            method.metrics, method.part = {}, (i, count)
            early = process.world_size > 1 and i + 1 < count  # the last backward shares the sum with the processes
            with self.model.no_sync() if early else contextlib.nullcontext():
                with torch.autocast(process.device.type, torch.bfloat16, enabled=self.bf16):
                    losses = self.model(part | {"epoch": epoch})
                loss = torch.stack(list(losses.values())).sum()
                (loss / count).backward()
            numbers = {"loss": loss} | {f"loss/{name}": value for name, value in losses.items()}
            numbers |= {"overlap": part["overlap"].mean()} if "overlap" in part else {}
            numbers = {k: v.detach() if isinstance(v, Tensor) else v for k, v in (numbers | method.metrics).items()}
            found.append((1, numbers))
        trained = itertools.chain(*(group["params"] for group in self.optimizer.param_groups))
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.copies is not None:
            self.copies.synchronize()  # long done; from now on the loader may write where the batch was
        self.done += 1
        step = Step(self.done, (mean(found) if count > 1 else numbers) | {"grad_norm": norm}, videos)
        if before is None or not any(process.gather([not step.is_finite()])):  # all processes decide alike
            self.optimizer.step()
            self.skipped_in_a_row = 0
            return step
        method.load_state_dict(before)
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.MOST_LEFT_OUT:
            raise UserError(f"{self.MOST_LEFT_OUT} steps in a row were left out, and now {step}")
        tqdm.write(f"process {process.rank}: a loss or its gradient is not finite, left out: {step}")
        return None


def program() -> list[str]:
    """How the program was called, without its flags: the script and, where it has such, the sub-command."""
    return list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv))


def fit(
    run: Run, load: Callable, out: Path, clips_per_video: int = 2, paths: Sequence[str] = (), extra: dict | None = None
) -> Path:
    """Trains to the end of the schedule, in a folder of this run alone (`runs.fit_in_folder`) → the last checkpoint.

    Args:
        load: step to start from → batches from there on, one a step; a batch is a dict of tensors (B, ...), of
            the videos of all micro-batches, and, under "bad", the list of (path, reason) of videos that could not be
            read and were replaced. The method gets each micro-batch with "epoch", how many of them have passed, a whole
            number at the start of each. "overlap" (B,), of the two windows of each video, is logged; "seconds" (B, 3),
            of reading, decoding and scaling, show what is slow. An OSError of the batches is taken for the user's.
        clips_per_video: of a batch, for the log's clips/s.
        paths: of the videos that a batch's "index" counts, to name those of a step that fails.
        extra: more entries of the checkpoints.

    Raises UserError where a file cannot be written, where more videos than `max_bad` are unreadable, or a loss is not
    finite; and Interrupted after SIGINT, SIGTERM or SIGHUP, when the state is saved.
    """
    config, process, saved, bad = run.config, run.process, time.monotonic(), []
    log = Log(run, out, clips_per_video * run.total_batch)
    with noted_signals(process) as caught, contextlib.closing(log.bar):
        batches, interrupted = iter(load(run.done)), False
        while run.done < run.stop and not interrupted:
            waiting = time.perf_counter()
            with user_errors((OSError,)):
                batch = next(batches)
            log.waited += time.perf_counter() - waiting
            bad += batch.pop("bad", [])
            log.making += batch.pop("seconds", torch.zeros(1, 3)).sum(0)
            videos = [paths[i] for i in batch["index"].tolist()] if paths and "index" in batch else []
            step = run.step(batch, videos)
            log.steps += [] if step is None else [step]
            log.bar.update()

            ends = run.done % run.steps_per_epoch == 0 or run.done == run.stop
            line_due = ends or run.done % config.log_every == 0
            if process.world_size > 1 and not line_due and run.done % 10:
                continue  # the rest has the processes wait for each other
            late = process.rank == 0 and time.monotonic() - saved >= 60 * config.save_minutes
            shares = process.gather([(bool(caught), late, bad)])  # so that all do the same
            interrupted, late = (any(share[i] for share in shares) for i in range(2))
            found, bad = [video for *_, share in shares for video in share], []
            log.add_bad(found)
            run.bad_videos += len(found)
            if run.bad_videos > config.max_bad * run.steps_per_epoch * run.total_batch:
                why = out / "bad_videos.log"
                named = *getattr(config, "exclude", "").split(","), "bad.txt"
                files = shlex.quote(",".join({name: 0 for name in named if name}))
                many = f"{run.bad_videos} videos of this epoch could not be read, more than --max_bad"
                advice = f"`cat {shlex.quote(str(why))} >> bad.txt` and leave them out by --exclude {files}"
                raise UserError(f"{many} {config.max_bad:g}; {why} says why: {advice}, or allow more")
            if line_due or interrupted:
                log.line()  # before saving, as it finds losses that are not finite
            if ends or interrupted or (late and line_due):
                run.save(out, extra or {})
                saved = time.monotonic()
            if ends or interrupted:
                log.summary()
                run.bad_videos = run.skipped = 0
        if any(process.gather([bool(caught) or interrupted])):  # in the last save, too
            local = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
            nodes = f"--nnodes={process.world_size // local} --node_rank=N --master_addr=HOST "
            launch = f"torchrun {nodes * (local < process.world_size)}--nproc_per_node={local}"
            launch = launch if process.world_size > 1 else "python"
            command = shlex.join([*program(), "--resume", str(out / "checkpoint.pt")])
            process.say(f"saved; continue with: {launch} {command}")
            raise Interrupted(caught[0] if caught else signal.SIGTERM)
    return out / "checkpoint.pt"
