"""examples/simclr.py: against a plain loop, one process against two, and its checkpoint in all that evaluates one."""

import math
import subprocess
import sys

import conftest
import pytest
import simclr
import torch
from helpers import ROOT, make_views, weights

import cli
import evaluate
import processes
import visualize


def build():
    """A method whose weights are always the same, with frozen batch norm."""
    torch.manual_seed(0)
    return simclr.SimCLR(simclr.SimCLRConfig(encoder="conv4", width=0.25, crop=32)).eval()


def test_the_loss_is_that_of_a_loop():
    method, views = build(), make_views(3, 0, 32)
    clips, color = method.both(views["clip"]), method.both(views["color"])
    with torch.no_grad():
        z = method.head(method.encoder(method.encoder_input(clips, color[:, 0])).mean((2, 3, 4)))
    z = (z / z.norm(dim=1, keepdim=True)).tolist()
    rows = []
    for i, query in enumerate(z):
        scores = [math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / 0.1) for key in z]
        rows.append(-math.log(scores[(i + 3) % 6] / (sum(scores) - scores[i])))
    assert method(views)["nce"].item() == pytest.approx(sum(rows) / 6, rel=1e-4)
    assert method.metrics["chance/nce"] == pytest.approx(math.log(5))


def step_process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    method, views = build(), make_views(4, 0, 32)
    parallel = torch.nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    (loss,) = parallel({name: value.chunk(2)[rank] for name, value in views.items()}).values()
    loss.backward()
    torch.save((loss.item(), [p.grad for p in method.parameters()]), f"{folder}/{rank}.pt")
    processes.end_process()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradient_of_one_with_the_same_batch(tmp_path):
    torch.multiprocessing.spawn(step_process, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    method = build()
    (loss,) = method(make_views(4, 0, 32)).values()
    loss.backward()
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for parameter, *both in zip(method.parameters(), found[0][1], found[1][1], strict=True):
        assert torch.equal(*both)
        torch.testing.assert_close(both[0], parameter.grad, rtol=1e-3, atol=1e-6 + 1e-4 * parameter.grad.abs().max())


@pytest.mark.slow
def test_its_checkpoint_goes_through_evaluation_and_into_a_report(run, monkeypatch, capsys):
    fast = [*conftest.CONV4, "--batch_size=4", "--device=cpu", "--epochs=1", "--out=run"]
    out = run.ok(simclr, *fast, small=False)
    assert "(chance 1.946)" in out and "own other half" in out
    state = weights(run.path / "run" / "checkpoint.pt")
    assert state["method"] == "SimCLR" and {"exp_avg", "exp_avg_sq", "step"} == state["optimizer"]["state"][0].keys()
    quick = ["--checkpoint=run/checkpoint.pt", "--device=cpu", "--workers=0", "--clips=2"]
    run.ok(evaluate, "finetune", *quick, "--epochs=1", "--batch_size=6")
    run.ok(evaluate, "retrieve", *quick)
    export = ["export", quick[0], "--to=torchvision"]
    run.refused(evaluate, *export, dataset=None, says=["torchvision has r2plus1d_18"])  # no conv4
    monkeypatch.setattr(sys, "argv", ["visualize.py", "report", "run", "--device", "cpu", "--workers", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.command_line(visualize.main)
    assert stop.value.code == 0, capsys.readouterr().err
    assert "SimCLR on synthetic" in (run.path / "run" / "report.html").read_text()


def test_the_learning_rate_rises_first():
    config = simclr.SimCLRConfig(lr=0.01, epochs=10, warmup=2.0)
    rates = [config.learning_rate(256, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates[0] == 0 and 0.004 < rates[1] < 0.006 < rates[2] < 0.01 and rates[2] > rates[3] > rates[4]


@pytest.mark.slow
def test_it_runs_from_any_folder_and_is_short(tmp_path):
    script = ROOT / "examples" / "simclr.py"
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--warmup" in done.stdout and "--queue" not in done.stdout, done.stderr
    assert len(script.read_text().splitlines()) <= 70
