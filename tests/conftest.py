"""What the tests share: settings, a small generated data set, and a way to run a script as its command line would."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # operators so small take longer where threads wait for each other

import pytest
from hypothesis import settings

import cli
import dclr
import evaluate
import fame
import fima
import moco
import pretrain
import synthetic

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "examples"))
import simclr
import tubelet_contrast

settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in a process for each core, at most four; what is named on the command line in one."""
    whole = config.args_source == config.ArgsSource.TESTPATHS and not config.option.usepdb
    alone = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")  # itself no such process
    if whole and alone and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = min(4, os.cpu_count() or 1), "loadfile"


SMALL = ["--encoder=r3d_18", "--width=0.0625", "--crop=48", "--batch_size=4", "--queue=8", "--device=cpu"]
DECODER = ["--decoder_width=32"]
METHODS = {
    dclr: (dclr.DCLR, dclr.DCLRConfig),
    fame: (fame.FAME, fame.FAMEConfig),
    fima: (fima.FIMA, fima.FIMAConfig),
    moco: (moco.MoCo, moco.MoCoConfig),
    simclr: (simclr.SimCLR, simclr.SimCLRConfig),
    tubelet_contrast: (tubelet_contrast.TubeletContrast, tubelet_contrast.TubeletContrastConfig),
}
CONV4 = ["--encoder=conv4", "--width=0.25", "--crop=32"]  # the cheapest


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A small generated data set: 18 training and 10 test videos."""
    root = tmp_path_factory.mktemp("videos") / "synthetic"
    synthetic.make_synthetic(root, train=18, test=10, frames=40, size=(56, 56))
    return root


@pytest.fixture
def run(videos, tmp_path, monkeypatch, capsys):
    """Runs a script in this process as its command line would; gives exit code, output and errors."""

    def call(script, *flags, dataset="synthetic", small=True):
        where = ["--dataset", dataset, "--data", str(videos)] if dataset else []
        own = [*(SMALL if small else []), *(DECODER if small and script is fima else []), "--workers=0"]
        monkeypatch.chdir(tmp_path)
        own = [] if script is evaluate or flags[:1] == ("maps",) else own  # which are sub-commands
        arguments = [*own, *flags, *where]  # the last of a kind counts
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
        method = METHODS.get(script)
        main = (lambda: pretrain.main(*method, script.PRESETS, script.__doc__)) if method else script.main
        with pytest.raises(SystemExit) as stop:
            cli.command_line(main)
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    call.path, call.videos = tmp_path, videos
    return call
