"""Command lines: options of a config from flags, presets and checkpoints, and how a script ends."""

import argparse
import contextlib
import dataclasses
import errno
import inspect
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist

from processes import end_process, meet
from runs import free_folders, load_checkpoint, saved_options
from train import HANGUP, SWITCH, Config, Interrupted, Options, UserError, allowed_text, method_name, program


def shown(text: str, besides: str = "") -> str:
    """A text for a terminal: what isn't printable, nor in `besides`, as its number, as codes in the name of a file."""
    return "".join(char if char.isprintable() or char in besides else repr(char)[1:-1] for char in text)


class _Output:
    """A standard stream in which no text has codes of a terminal's. What nobody reads is lost, and the end of the
    terminal itself is a SIGHUP."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, shown(text, "\n\r\t"))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, function: Callable[..., Any], *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if HANGUP and error.errno == errno.EIO:
                signal.raise_signal(HANGUP)


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
    if HANGUP and signal.getsignal(HANGUP) == signal.SIG_DFL:
        signal.signal(HANGUP, signal.default_int_handler)
    code, message = 0, ""
    with contextlib.redirect_stdout(_Output(sys.stdout)), contextlib.redirect_stderr(_Output(sys.stderr)):
        try:
            main()
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
    free_folders()
    end_process()
    if any(thread.name == meet.__name__ for thread in threading.enumerate()):  # torch's own would abort a usual exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parse(
    config_class: type[Config], doc: str, presets: dict[str, dict] | None = None, argv: list[str] | None = None
) -> Config:
    """Command line → config. Explicit flags win over the options of the checkpoint to resume, these over the preset
    that `--dataset` selects, and this over the defaults. Raises UserError where a flag or value is unknown, the
    checkpoint can't be read or is of another method, or an option makes another run of it."""
    presets = presets or {}
    parser = _Parser(
        " ".join(program()), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(config_class):
        default, text = str(field.default), allowed_text(field)
        default += f"; {text}" * (field.type is not str)
        parser.add_argument(
            *dict.fromkeys(["--" + field.name, "--" + field.name.replace("_", "-")]),
            type=field.type,
            default=argparse.SUPPRESS,
            metavar=text if field.type is str and text else field.type.__name__.upper(),
            help=(field.metadata["help"] + f" (default: {default})" * bool(default)).replace("%", "%%"),
            **({"nargs": "?", "const": "on"} if field.metadata["allowed"] == SWITCH else {}),
        )
    lines = [f"  {name}: " + " ".join(f"--{k} {v}" for k, v in preset.items()) for name, preset in presets.items()]
    parser.epilog = "\n".join(["what --dataset NAME sets (explicit flags win):", *lines]) if lines else None
    given = vars(parser.parse_args(argv))
    saved, path, method = {}, given.get("resume", ""), method_name(config_class)
    if path not in ("", "auto"):
        state = load_checkpoint(path)
        if state["method"] != method:
            raise UserError(f"{path} is a checkpoint of {state['method']}, not of {method}")
        saved = saved_options(path, state, config_class, given.keys() & (config_class.FREE | config_class.TUNED))
        given.setdefault("out", str(Path(path).parent))
    dataset = given.get("dataset", saved.get("dataset", getattr(config_class, "dataset", "")))
    made = {field.name: field.default for field in dataclasses.fields(config_class)}
    made |= presets.get(dataset, {}) | saved
    for name, value in given.items() if saved else ():
        if value != made[name] and name not in config_class.FREE | config_class.TUNED:
            raise UserError(f"{path} was trained with --{name} {made[name]}, not {value}: start anew, without --resume")
    return config_class(**made | given)


def dispatch(commands: dict[str, tuple], doc: str, words: bool = False) -> tuple[str, Callable, Options, list[str]]:
    """Which command `PROGRAM NAME [WORD …] --flag value …` names: its name, function, options and words, for the caller
    to run. `--help` alone prints `doc`, `NAME --help` the command's own help, and both end the program.

    Args:
        commands: for each name a function and the class of its config, whose docstrings are its help, and where it has
            any, presets (see `parse`). What is named "" runs where no name is given, and has `doc` as its help.
        words: take words between the name and the flags.

    Raises UserError where there is no such command, and as `parse` does.
    """
    given = sys.argv[1:]
    name = given.pop(0) if given and not ("" in commands and given[0].startswith("-")) else ""
    if name in ("-h", "--help"):
        print(doc)
        raise SystemExit
    if name not in commands:
        raise UserError(f"name one of {', '.join(filter(None, commands))} (--help explains them)")
    function, config_class, *presets = commands[name]
    taken = list(itertools.takewhile(lambda word: words and not word.startswith("-"), given))
    doc = "\n\n".join(map(inspect.getdoc, (function, config_class))) if name else doc
    config = parse(config_class, doc, *presets, argv=given[len(taken) :])
    return name, function, config, taken
