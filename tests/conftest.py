"""What the tests share: settings, a small generated data set, and a way to run a script as its command line would."""

import functools
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # operators so small take longer where threads wait for each other

import benchmark
import draw_method
import pytest
import shrink
from helpers import SMALL, free_folders, one_line
from hypothesis import settings

import cli
import data
import evaluate
import fima
import pretrain
import synthetic
import visualize
from video import Video

settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("project")
data.TestClips.__test__ = False  # no test case, whatever its name makes pytest think
COMMANDS = benchmark, data, draw_method, evaluate, shrink, visualize


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in a process more than there are cores, as some tests wait, and in at most four; what is
    named on the command line in one."""
    whole = config.args_source == config.ArgsSource.TESTPATHS and not config.option.usepdb
    alone = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")  # itself no such process
    if whole and alone and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = min(4, 1 + (os.cpu_count() or 1)), "worksteal"


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A small generated data set: 18 training and 10 test videos."""
    root = tmp_path_factory.mktemp("videos") / "synthetic"
    synthetic.make_synthetic(root, train=18, test=10, frames=40, size=(56, 56))
    return root


def options_of(module):
    """A method's class, config, presets and help."""
    (name,) = (name for name in vars(module) if name.lower() == module.__name__.replace("_", ""))
    return getattr(module, name), getattr(module, f"{name}Config"), module.PRESETS, module.__doc__


def main_of(module):
    """A script's main, which in a method's script has to be told what the method is."""
    return functools.partial(module.main, *options_of(module)) if module.main is pretrain.main else module.main


@pytest.fixture(scope="session")
def trained(videos):
    """Trains a method for two steps, so that batch norm's statistics are no round numbers; gives the run folder."""

    def call(folder, module, *flags):
        flags = [*SMALL, *flags, "--workers=0", "--max_steps=2", "--dataset=synthetic", f"--data={videos}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{module.__name__}.py", *flags, f"--out={folder}"])
            main_of(module)()
        return folder

    return call


@pytest.fixture
def requested(monkeypatch):
    """The frames asked for by each call of Video.stream, as they come."""
    calls, stream = [], Video.stream
    monkeypatch.setattr(Video, "stream", lambda video, frames: stream(video, calls.append([*frames]) or calls[-1]))
    return calls


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Runs a script in this process as a command line of these words would; gives exit code, output and errors."""

    def call(module, *words, main=None):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.command_line(main or module.main)
        free_folders()
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def run(videos, tmp_path, monkeypatch, in_process):
    """The same with small models and the generated data set. `run.ok` gives the output of what ends well,
    `run.refused` checks that it ends with one line that says these words."""

    def call(module, *flags, dataset="synthetic", small=True):
        where = ["--dataset", dataset, "--data", videos] if dataset else []
        own = [*SMALL * small, *["--decoder_width=32"] * (small and module is fima), "--workers=0"]
        monkeypatch.chdir(tmp_path)
        own = [] if module in COMMANDS or flags[:1] == ("maps",) else own  # which are sub-commands
        return in_process(module, *own, *flags, *where, main=main_of(module))  # the last of a kind counts

    def ok(*arguments, **options):
        code, out, err = call(*arguments, **options)
        assert code == 0, err
        return out

    def refused(*arguments, says, **options):
        code, _, err = call(*arguments, **options)
        assert code == 2, err
        one_line(err, *says)

    call.path, call.videos, call.ok, call.refused = tmp_path, videos, ok, refused
    return call
