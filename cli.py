"""How a script starts and ends: options from flags, presets and checkpoints; its place among the processes of a run."""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import functools
import inspect
import itertools
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist

import train
from runs import load_checkpoint, saved_options
from train import Config, Interrupted, Options, Process, TrainConfig, UserError, method_name


def shown(text: str, besides: str = "") -> str:
    """A text for a terminal: what isn't printable, nor in `besides`, as its number, as codes in the name of a file."""
    return "".join(char if char.isprintable() or char in besides else repr(char)[1:-1] for char in text)


class _Output:
    """A standard stream without codes of a terminal's. What nobody reads is lost; the terminal's end is a SIGHUP. What
    a progress bar shows is a line of its own where there is no terminal, and nothing with --quiet."""

    def __init__(self, stream: TextIO):
        self.stream, self.bar = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        quiet, bar = "--quiet" in sys.argv, text.strip("\r ")  # tqdm returns to the line's begin, and may blank it
        if text.startswith("\r") and (quiet or not self.stream.isatty()):
            text = f"{bar}\n" * (bar not in ("", self.bar) and not quiet)  # its end is told twice
            self.bar = bar or self.bar
        self.attempt(self.stream.write, shown(text, "\n\r\t"))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, function: Callable[..., Any], *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if train.HANGUP and error.errno == errno.EIO:
                signal.raise_signal(train.HANGUP)


def _follow(parent: int) -> None:
    """Sends this process a SIGTERM when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def command_line(main: Callable[[], None]) -> NoReturn:
    """Runs a script: a UserError is one line and exit code 2, the loss of another process of the run one and 1, an
    interrupt 128 + its signal. The end of the terminal is an interrupt, unless SIGHUP is ignored, as under nohup; with
    streams that are closed, or that nobody reads, it goes on. The end of torchrun, even by SIGKILL, is one, too."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # a stream that is closed: its number is not for other files
        pass
    os.close(number)
    sys.stdout, sys.stderr = (stream or os.fdopen(n, "w") for n, stream in ((1, sys.stdout), (2, sys.stderr)))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files need not fit the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    if train.HANGUP and signal.getsignal(train.HANGUP) == signal.SIG_DFL:
        signal.signal(train.HANGUP, signal.default_int_handler)
    code, message = 0, ""
    with contextlib.redirect_stdout(_Output(sys.stdout)), contextlib.redirect_stderr(_Output(sys.stderr)):
        try:
            try:
                main()
            finally:  # of --help, too, which ends by SystemExit
                sys.stdout.flush()
        except UserError as error:
            code, message = 2, f"error: {shown(str(error))}"
        except Interrupted as error:
            code = 128 + error.args[0]
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
                advice = "take a smaller --batch_size, --test_batch, --crop, --frames or model, or fewer --workers"
                code, message = 2, f"error: out of memory: {advice}"
            elif dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                lost = f"process {dist.get_rank()} has lost another one, which ended, or was silent beyond --timeout"
                code, message = 1, f"error: {lost}: start all again, in training with --resume auto"
            else:
                raise
        with contextlib.suppress(KeyboardInterrupt):  # of the terminal's end
            print(message, end="\n" * bool(message), file=sys.stderr)
    end_process()
    if any(thread.name == meet.__name__ for thread in threading.enumerate()):  # torch's own would abort a usual exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


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
        found = " ".join(f"{name}={value}" for name, value in given.items())
        advice = f"start several processes with torchrun, or one after `unset {' '.join(given)}`"
        raise UserError(f"the environment has {found}, which is not as torchrun sets it: {advice}")
    return rank, world_size, local_rank


def start_process(device: str = "auto", timeout: float = 10, deterministic: bool = False) -> Process:
    """Joins the run that torchrun's environment describes, or stands alone without it, and gives up waiting for another
    process after `timeout` minutes. With `deterministic`, torch takes deterministic algorithms, and warns where it has
    none.

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
        meet(place, timeout, rank, world_size)
    return Process(rank, world_size, place)


def meet(place: torch.device, timeout: float, rank: int, world_size: int) -> None:
    """Meets the other processes, or raises UserError: torch by itself tries for longer than its time-out, and without
    end where something else answers, and tells each try in lines of its own."""
    outcome = [TimeoutError(f"not all are there after --timeout {timeout:g} minutes")]

    def join() -> None:
        try:
            if own:
                torch.cuda.set_device(place)  # each thread has its own
            dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(minutes=timeout), **own)
            outcome[0] = None
        except Exception as error:
            outcome[0] = error

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
    if error := outcome[0]:
        if not isinstance(error, RuntimeError | ValueError | OSError):
            raise error
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({str(error).splitlines()[0]})"
        what = f"process {rank} of {world_size} does not meet the others at {where}"
        raise UserError(f"{what}: start all of them, with torchrun") from error


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (flags come last; --help-all lists them)")


def make_parser(config_class: type[Options], doc: str, whole: bool, words: str, preset: dict) -> _Parser:
    """The parser of a config's flags, before which come `words`. Its help shows the defaults with those of `preset`. Of
    more than 30 flags, it leaves out those of `train.detail`, and the limits of all, if not `whole`."""
    fields, columns = dataclasses.fields(config_class), shutil.get_terminal_size((120, 0)).columns
    hidden = [field for field in fields if field.metadata["detail"] and not whole and len(fields) > 30]
    style = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=min(columns, 120))
    options = dict(formatter_class=style, argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser = _Parser(" ".join(train.program()), f"%(prog)s {words} [--flag value …]".replace("  ", " "), doc, **options)
    groups = {}
    for field in fields:
        owner = next(c for c in reversed(config_class.__mro__) if field.name in getattr(c, "__dataclass_fields__", ()))
        title = vars(owner).get("HEADING", method_name(config_class))
        title = "optimisation" if field.name in TrainConfig.TUNED else title
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        default, text = str(preset.get(field.name, field.default)), train.allowed_text(field)
        default += f"; {text}" * (field.type is not str and not hidden)
        help = (field.metadata["help"] + f" (default: {default})" * bool(default)).replace("%", "%%")
        help = argparse.SUPPRESS if field in hidden else help
        metavar = text if field.type is str and text else field.type.__name__.upper()
        switch = {"nargs": "?", "const": "on"} if field.metadata["allowed"] == train.SWITCH else {}
        group.add_argument("--" + field.name, type=field.type, metavar=metavar, help=help, **switch)
    parser.add_argument("--print_config", action="store_true", help="print the value of every option, and end")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("-h", "--help", action="help", help="show this text; with --help-all all of it")
    parser.add_argument("--help_all", action="help", help=argparse.SUPPRESS)
    parser.epilog = f"--help-all lists {len(hidden)} more flags, and the limits of all" if hidden else None
    return parser


def parse(config_class: type[Config], doc: str, presets: dict | None = None, argv=None, before: str = "") -> Config:
    """Command line → config, - for _ or not. Explicit flags win over the options of a checkpoint to resume or, without
    one, over the preset that `--dataset` selects, and these over the defaults. Raises UserError where a flag or value
    is unknown, the checkpoint can't be read or is of another method, or an option makes another run of it."""
    presets, words = presets or {}, sys.argv[1:] if argv is None else argv
    words = [re.sub("(?<=^--)[^=]+", lambda name: name[0].replace("-", "_"), word) for word in words]
    first = _Parser(add_help=False, allow_abbrev=False)  # --help shows the defaults of the --dataset beside it
    first.add_argument("--dataset", default=getattr(config_class, "dataset", ""))
    preset = presets.get(first.parse_known_args(words)[0].dataset, {})
    given = vars(make_parser(config_class, doc, "--help_all" in words, before, preset).parse_args(words))
    show, _ = (given.pop(name, False) for name in ("print_config", "quiet"))
    saved, path, method = {}, given.get("resume", ""), method_name(config_class)
    if path not in ("", "auto"):
        state = load_checkpoint(path)
        if state["method"] != method:
            raise UserError(f"{path} is a checkpoint of {state['method']}, not of {method}")
        saved = saved_options(path, state, config_class, given.keys() & (config_class.FREE | config_class.TUNED))
        given.setdefault("out", str(Path(path).parent))
    dataset = given.get("dataset", saved.get("dataset", getattr(config_class, "dataset", "")))
    made = {field.name: field.default for field in dataclasses.fields(config_class)}
    made |= saved or presets.get(dataset, {})  # what is newer than the run has its default
    for name, value in given.items() if saved else ():
        if value != made[name] and name not in config_class.FREE | config_class.TUNED:
            raise UserError(f"{path} was trained with --{name} {made[name]}, not {value}: start anew, without --resume")
    config = config_class(**made | given)
    if show:
        print(config)
        raise SystemExit(0)
    return config


def dispatch(commands: dict[str, tuple], doc: str, words: str = "") -> tuple[str, Callable, Options, list[str]]:
    """Which command `PROGRAM NAME [WORD …] --flag value …` names: its name, function, options and words, for the caller
    to run. `--help` alone prints `doc`, `NAME --help` the command's own help, and both end the program.

    Args:
        commands: for each name a function and the class of its config, whose docstrings are its help, and where it has
            any, presets (see `parse`). What is named "" runs where no name is given, and has `doc` as its help.
        words: what to call those between the name and the flags in the help; "": there are none.

    Raises UserError where there is no such command, and as `parse` does.
    """
    given = sys.argv[1:]
    name = given.pop(0) if given and not ("" in commands and given[0].startswith("-")) else ""
    if name in ("-h", "--help", "--help_all", "--help-all"):
        print(doc)
        raise SystemExit
    if name not in commands:
        raise UserError(f"name one of {', '.join(filter(None, commands))} (--help explains them)")
    function, config_class, *presets = commands[name]
    taken = list(itertools.takewhile(lambda word: words and not word.startswith("-"), given))
    doc = "\n\n".join(map(inspect.getdoc, (function, config_class))) if name else doc
    return name, function, parse(config_class, doc, *presets, argv=given[len(taken) :], before=words), taken
