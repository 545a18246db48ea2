"""The command as a user types it: in a process of its own, with exit codes, kills and mistakes."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest

from conftest import COMMAND, assert_same, training_state
from flowbook.checkpoint import read_checkpoint
from flowbook.tracking import read_metrics

SMALL = ["--dataset", "moons-all", "--batch-size", 100, "--arch-options", "width=16", "depth=2", "--wandb-project", "None"]
RUN = "mlp-icfm-moons-all-none"


@pytest.fixture
def moons(flowbook):
    assert flowbook("prepare", "moons", "--points", 1000).returncode == 0


def test_the_studys_resume_test(flowbook, moons, tmp_path):
    first = flowbook("train", "--epochs", 2, *SMALL)
    assert first.returncode == 0, first.stderr
    second = flowbook("train", "--epochs", 4, "--resume", *SMALL)
    assert second.returncode == 0, second.stderr
    assert "Stats consistency check: PASSED" in second.stdout
    assert f"Going on with {RUN} at step 14, in epoch 3 of 4" in second.stdout
    assert "4 of at most 4: all epochs are done" in second.stdout
    assert [row["epoch"] for row in read_metrics(tmp_path / "checkpoints" / RUN) if "val/loss" in row] == [1, 2, 3, 4]
    third = flowbook("train", "--epochs", 4, "--resume", *SMALL)
    assert third.returncode == 0 and f"The run {RUN} is finished" in third.stdout


def wait_for(path, seconds=300):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(flowbook, moons, tmp_path, number, code):
    long = [*SMALL, "--epochs", 400]
    assert flowbook("train", *long, "--checkpoint-dir", "unbroken").returncode == 0
    command = [COMMAND, "train", *map(str, long)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "checkpoints" / RUN / "last.pt")        # Of 2,800 steps it has made a few dozen
    process.send_signal(number)
    assert process.wait(timeout=300) == code
    assert not (tmp_path / "checkpoints" / RUN / "samples.png").exists()
    resumed = flowbook("train", *long, "--resume")
    assert resumed.returncode == 0 and "Going on with" in resumed.stdout, resumed.stdout + resumed.stderr
    states = [training_state(read_checkpoint(tmp_path / folder / RUN / "last.pt")) for folder in ("unbroken", "checkpoints")]
    assert_same(*states)
    records = [(tmp_path / folder / RUN / "metrics.jsonl").read_bytes() for folder in ("unbroken", "checkpoints")]
    assert records[0] == records[1]


def test_a_configuration_from_a_file_and_flags_over_it(flowbook, moons, tmp_path):
    (tmp_path / "study.toml").write_text('dataset = "digits-1k"\nbatch_size = 100\nepochs = 1\n[arch_options]\nwidth = 16\n')
    result = flowbook("train", "--config", "study.toml", "--dataset", "moons-all", "--wandb-project", "None")
    assert result.returncode == 0, result.stderr        # the statistics are those of moons, not of the file's digits
    state = read_checkpoint(tmp_path / "checkpoints" / RUN / "last.pt")
    assert state["config"]["arch_options"] == {"width": 16} and state["config"]["stats_path"] == "datasets/moons/normalization_stats.pt"


def test_own_vectors_from_preparing_to_sampling(flowbook, tmp_path):
    np.save(tmp_path / "embeddings.npy", np.random.default_rng(0).normal(3, 2, size=(300, 384)).astype("float32"))
    assert flowbook("prepare", "embeddings.npy").returncode == 0
    trained = flowbook("train", "--dataset", "embeddings-all", "--epochs", 2, "--batch-size", 64, "--wandb-project", "None")
    assert trained.returncode == 0, trained.stderr
    assert "picture" not in trained.stdout
    sampled = flowbook("sample", "mlp-icfm-embeddings-all-none", "-n", 10, "--method", "euler", "--steps", 5)
    assert sampled.returncode == 0, sampled.stderr
    assert np.load(tmp_path / "checkpoints/mlp-icfm-embeddings-all-none/samples.npy").shape == (10, 384)


def test_a_run_is_evaluated_for_programs_and_for_people(flowbook, moons, tmp_path):
    assert flowbook("train", "--epochs", 2, *SMALL).returncode == 0
    result = flowbook("evaluate", RUN, "--most", 40)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "checkpoints" / RUN
    results = json.loads((folder / "evaluation.json").read_text())
    assert results["run"] == RUN and results["points"] == 40
    assert [sampler["evaluations"] for name, sampler in results["samplers"].items() if name != "dopri5"] == [1, 2, 4, 8, 100]
    assert results["baseline"]["sliced_wasserstein"] < results["samplers"]["euler-1"]["sliced_wasserstein"]
    for line in (folder / "evaluation.md").read_text().splitlines()[2:]:
        assert line in result.stdout
    first = (folder / "evaluation.json").read_bytes()
    assert flowbook("evaluate", str(folder), "--most", 40, "--data-dir", str(tmp_path / "datasets")).returncode == 0
    assert json.loads((folder / "evaluation.json").read_bytes()) == json.loads(first) | {"checkpoint": str(folder / "best.pt")}
    gone = flowbook("evaluate", RUN, "--data-dir", "elsewhere")
    assert gone.returncode == 2 and "elsewhere" in gone.stderr and (folder / "evaluation.md").exists()


def test_one_distribution_is_carried_to_another_from_the_command_line(flowbook, tmp_path):
    """8gaussians → moons in their own units, from endless data; then samples, and what they are worth."""
    assert flowbook("prepare", "moons", "--points", 1000, "--no-normalize").returncode == 0
    trained = flowbook("train", "--flow", "otcfm", "--flow-options", "ot_batch_size=256", "--source", "8gaussians", "--dataset",
                       "moons-endless", "--steps-per-epoch", 20, "--epochs", 2, "--batch-size", 64, "--wandb-project", "None")
    assert trained.returncode == 0, trained.stderr
    assert "fresh points of shape (2,)" in trained.stdout and "20 steps an epoch" in trained.stdout
    run = "mlp-otcfm-8gaussians-to-moons-endless-none"
    assert (tmp_path / "checkpoints" / run / "samples.png").exists()
    assert "evaluations of the network for each" in flowbook("sample", run, "-n", 10).stdout
    evaluated = flowbook("evaluate", run, "--most", 40)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "log-likelihood of the test points: not measured" in evaluated.stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["train"], "type: flowbook prepare digits"),
    (["train", "--config", "missing.toml"], "missing.toml"),
    (["train", "--config"], "--config needs a file"),
    (["train", "--epochs", 0], "epochs=0 is not allowed: it must be at least 1"),
    (["train", "--arch-options", "width"], "write name=value"),
    (["train", "--device", "cuda:77"], ""),
    (["prepare", "minist"], "minist"),
    (["prepare", "digits", "--sizes", "5k"], "1,259 training points"),
    (["sample", "nothing"], "runs in checkpoints: none yet"),
    (["evaluate", "nothing"], "runs in checkpoints: none yet"),
    (["train", "--flow", "reflow"], "type: flowbook prepare digits"),
    (["sing"], "unknown command 'sing': it must be one of prepare, train, sample, evaluate, gpu"),
])
def test_a_mistake_is_a_sentence_and_leaves_nothing_behind(flowbook, tmp_path, arguments, words):
    result = flowbook(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr + result.stdout
    assert words in " ".join((result.stderr + result.stdout).replace("│", " ").split())
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("command", [[], ["prepare"], ["train"], ["sample"], ["gpu"]])
def test_help_teaches(flowbook, command):
    result = flowbook(*command, "--help")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) > 8


def test_gpu_says_what_is_there(flowbook):
    result = flowbook("gpu", "--expected-gpus", "H100")
    assert result.returncode == 0
    assert result.stdout.startswith(("GPU ", "No GPU: training on the CPU"))


def test_the_version(flowbook):
    result = flowbook("--version")
    assert result.returncode == 0 and result.stdout.startswith("flowbook ")


def test_a_finished_run_whose_samples_cannot_be_written_is_still_a_success(flowbook, moons, tmp_path):
    assert flowbook("train", "--epochs", 1, *SMALL).returncode == 0
    folder = tmp_path / "checkpoints" / RUN
    (folder / "best.pt").unlink()
    without = flowbook("train", "--epochs", 1, "--resume", *SMALL)
    assert without.returncode == 0 and "1 of at most 1: all epochs are done" in without.stdout
    assert "warning: no samples were drawn" in without.stderr and "best.pt" in without.stderr
