"""A run that is killed at any moment, or loses its power, goes on and ends as the run that was never touched, bit for bit.

Each training is a child process that tells its parent of every operation on the run's folder before it does it, as in
"rename .last.pt.tmp last.pt", and is killed before one of them. Names are relative to the run's folder: ".." is checkpoint_dir.
Of what a kill can't show, because the system still writes what a dead process gave it, power cuts are computed from what was flushed.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple

import pytest
import torch

from conftest import COMMAND, FLOW_CASES, assert_same, training_state
from flowbook.checkpoint import CheckpointError, read_checkpoint, run_folder
from flowbook.config import TrainingConfig
from flowbook.data import AUGMENTATIONS
from flowbook.ema import EMAModel
from flowbook.flows import FLOWS
from flowbook.nets import create_model
from flowbook.randomness import set_seed
from flowbook.runs import Saver, read_summary
from flowbook.tracking import read_metrics
from flowbook.trainer import FlowTrainer

# A server that has imported everything and done nothing forks a child in no time. Forks of pytest itself would inherit its threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "flowbook.trainer", "torch._dynamo"])     # The last is what the first optimiser imports

Strike = namedtuple("Strike", "event number torn", defaults=[1, None])
Strike.__doc__ = "Be killed before the n-th such event; or from then on after 20 more bytes in the file `torn`."


# ---- in the child

def train(config, pipe, strike=None, power_cuts=False):
    """Start or go on with a run, save after every step, and tell of each operation; at the end, of what power cuts would have left."""
    folder, seen = run_folder(config.run_name, config.checkpoint_dir), Counter()
    disk = Disk(folder) if power_cuts else None

    def note(event):
        seen[event] += 1
        if strike and (event, seen[event]) == strike[:2]:
            die(strike, folder)
        pipe.send(event)
        if disk:
            disk.cut(steps_saved=seen["step"] if event == "saved" else None)

    def named(path):
        return os.path.relpath(path, folder)

    def audit(what, arguments):
        """Python calls it before each of its operations on files, whichever function they were asked for with."""
        if what not in ("open", "os.mkdir", "os.rename", "os.remove") or not str(arguments[0]).startswith(str(folder.parents[1])):
            return
        if what == "os.rename":
            note(f"rename {named(arguments[0])} {named(arguments[1])}")
        elif what == "os.remove" or what == "os.mkdir" and not os.path.exists(arguments[0]) or what == "open" and arguments[2] & os.O_CREAT:
            note(f"{what.removeprefix('os.')} {named(arguments[0])}")

    def fsync(descriptor):      # Only tells: a kill does not show whether it was done, and it takes most of the time
        places = [path for path in (*folder.parents[:3], folder, *folder.glob("*")) if path.exists()]
        for path in places:
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                note(f"fsync {named(path)}")
                if disk:
                    disk.flushed(path)

    def told(function, before, after=None):
        def telling(*arguments, **options):
            note(before)
            result = function(*arguments, **options)
            if after:
                note(after)
            return result
        return telling

    torch.set_num_threads(1)
    os.fsync = fsync
    EMAModel.approach = told(EMAModel.approach, "step")     # Between the optimiser's step and the end of ours
    FlowTrainer.validate = told(FlowTrainer.validate, "validate")
    Saver.save = Saver.save_if_due = told(Saver.save, "save", "saved")
    sys.addaudithook(audit)
    set_seed(config.seed)
    model = create_model(config.arch, (2,), **config.arch_options)
    FlowTrainer(model, config, wandb_project=None, resume_path="auto").train()
    note("end")
    if disk:
        pipe.send(disk.seen)


def die(strike, folder):
    """End as by SIGKILL: now, or by the system in the middle of writing a file, with a signal that nothing handles either."""
    if strike.torn is None:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = 0 if strike.event.startswith("open ") or not (folder / strike.torn).exists() else (folder / strike.torn).stat().st_size
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (begun + 20, begun + 20))


class Disk:
    """What a power cut would leave of a folder: each file as it was last flushed, and the names that the folder had when it was last
    flushed, or those that it has now. `seen`: {files and contents: step of the last save that had returned}."""

    def __init__(self, folder):
        self.folder, self.there, self.names, self.contents, self.held = folder, False, {}, {}, {}
        self.saved, self.seen = 0, {}

    def names_now(self):
        paths = [path for path in self.folder.iterdir() if path.is_file()] if self.folder.exists() else []
        for path in paths:
            if path.stat().st_ino not in self.held:
                self.held[path.stat().st_ino] = open(path, "rb")        # No other file gets its number while it is open
        return {path.name: path.stat().st_ino for path in paths}

    def flushed(self, path):
        if path == self.folder:
            self.names = self.names_now()
        elif path == self.folder.parent:
            self.there = self.folder.exists()
        elif path.parent == self.folder:
            self.contents[self.names_now()[path.name]] = path.read_bytes()

    def cut(self, steps_saved=None):
        self.saved = steps_saved or self.saved
        for names in (self.names if self.there else {}, self.names_now()):
            self.seen[frozenset((name, self.contents.get(number, b"")) for name, number in names.items())] = self.saved


# ---- in the parent

def in_a_child(config, *arguments):
    """`train` in a process of its own: its exit code, and what it told."""
    reader, writer = SERVER.Pipe(duplex=False)
    child = SERVER.Process(target=train, args=(config, writer, *arguments))
    child.start()
    writer.close()
    told = []
    try:
        while reader.poll(60):
            told.append(reader.recv())
        child.kill()
        raise AssertionError(f"the child hangs after {told[-3:]}")
    except EOFError:
        child.join()
    return child.exitcode, told


def folder_of(config):
    return run_folder(config.run_name, config.checkpoint_dir)


def step_of(path):
    """The step of a state; 0 when it is not there or not whole."""
    try:
        return read_checkpoint(path)["step"]
    except CheckpointError:
        return 0


def newest_step(folder, names=("last.pt", "previous.pt", "best.pt")):
    return max(step_of(folder / name) for name in names)


def damage(path, position=5000, by=1):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= by
    path.write_bytes(content)


def assert_same_run(first, second, after=""):
    """Two folders hold the same run, and nothing half done."""
    for name in ("last.pt", "best.pt"):
        assert_same(*(training_state(read_checkpoint(folder / name)) for folder in (first, second)), f"{name} after {after}")
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes(), f"metrics.jsonl after {after}"
    assert read_summary(second)["status"] == "finished", after
    assert not list(second.glob(".*")), after


Unbroken = namedtuple("Unbroken", "config folder events disks")


def unbroken_run(config, power_cuts=False):
    code, events = in_a_child(config, None, power_cuts)
    assert code == 0
    disks = events.pop() if power_cuts else None
    return Unbroken(config, folder_of(config), events, disks)


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory):
    """The run that no one touches: 2 epochs of 3 steps, a best.pt in both, a row of the record in each step."""
    return unbroken_run(TrainingConfig(
        dataset="moons-all", epochs=2, batch_size=230, lr=2e-3, warmup_steps=1, log_every=1, data_dir=str(data_dir), device="cpu",
        arch_options={"width": 8, "depth": 1, "dropout": 0.2}, checkpoint_dir=str(tmp_path_factory.mktemp("unbroken") / "runs")),
        power_cuts=True)


def goes_on(unbroken, config, saved, after):
    """What is left in a run's folder has the state that was saved, and going on from there ends in the unbroken run."""
    start, steps = newest_step(folder_of(config)), unbroken.events.count("step")
    assert start >= saved, f"after {after} the newest state is that of step {start}, although step {saved} had been saved"
    code, events = in_a_child(config)
    assert code == 0, after
    assert events.count("step") == steps - start, after
    assert_same_run(unbroken.folder, folder_of(config), after)


def nth(events, event, number):
    """The position of the first, second ... such event; of the last one for 0."""
    return [position for position, each in enumerate(events) if each == event][number - 1]


def killed_run_goes_on(unbroken, checkpoint_dir, strike):
    checkpoint_dir.mkdir(exist_ok=True)
    config = unbroken.config.replace(checkpoint_dir=str(checkpoint_dir / "runs"))
    code, events = in_a_child(config, strike)
    assert code == (-signal.SIGXFSZ if strike.torn else -signal.SIGKILL), f"{strike}: it was not killed but ended with {code}"
    assert events == unbroken.events[:len(events)], strike
    saved = events[:nth(events, "saved", 0)].count("step") if "saved" in events else 0       # By the last save that had returned
    goes_on(unbroken, config, saved, after=f"a kill at {strike}")


@pytest.mark.parametrize("strike", [pytest.param(Strike(*strike), id=name) for name, strike in {
    "in the first step": ["step"],
    "in a later step": ["step", 5],
    "in validation": ["validate", 2],
    "in the first row of the record": ["step", 1, "metrics.jsonl"],
    "in a later row of the record": ["step", 5, "metrics.jsonl"],
    "in the row of a validation": ["validate", 2, "metrics.jsonl"],
    "before the record is flushed": ["fsync metrics.jsonl", 5],
    "in writing the first last.pt": ["open .last.pt.tmp", 1, ".last.pt.tmp"],
    "in writing a later last.pt": ["open .last.pt.tmp", 5, ".last.pt.tmp"],
    "between writing and flushing the first last.pt": ["fsync .last.pt.tmp", 1],
    "between writing and flushing a later last.pt": ["fsync .last.pt.tmp", 5],
    "between flushing and renaming the first last.pt": ["rename .last.pt.tmp last.pt", 1],
    "between flushing and renaming a later last.pt": ["rename last.pt previous.pt", 4],
    "between the two renames, the first time": ["rename .last.pt.tmp last.pt", 2],
    "between the two renames, a later time": ["rename .last.pt.tmp last.pt", 5],
    "between the two renames, when best.pt has the last step": ["rename .last.pt.tmp last.pt", 6],
    "after the first last.pt": ["saved", 1],
    "after a later last.pt": ["saved", 5],
    "in writing the first best.pt": ["open .best.pt.tmp", 1, ".best.pt.tmp"],
    "in writing a later best.pt": ["open .best.pt.tmp", 2, ".best.pt.tmp"],
    "between writing and flushing the first best.pt": ["fsync .best.pt.tmp", 1],
    "between writing and flushing a later best.pt": ["fsync .best.pt.tmp", 2],
    "between flushing and renaming the first best.pt": ["rename .best.pt.tmp best.pt", 1],
    "between flushing and renaming a later best.pt": ["rename .best.pt.tmp best.pt", 2],
    "in writing the first summary.json": ["open .summary.json.tmp", 1, ".summary.json.tmp"],
    "in writing the last summary.json": ["open .summary.json.tmp", 2, ".summary.json.tmp"],
    "between writing and renaming the last summary.json": ["rename .summary.json.tmp summary.json", 2],
    "after everything": ["end"],
}.items()])
def test_a_run_that_is_killed_goes_on(unbroken, tmp_path, strike):
    killed_run_goes_on(unbroken, tmp_path, strike)


@pytest.mark.parametrize(("renamed", "number"), [("last", 1), ("last", 5), ("best", 1), ("best", 2)])
def test_a_run_that_is_killed_between_rename_and_flush_of_the_folder_goes_on(unbroken, tmp_path, renamed, number):
    at = nth(unbroken.events, f"rename .{renamed}.pt.tmp {renamed}.pt", number) + 1
    assert unbroken.events[at] == "fsync ."
    killed_run_goes_on(unbroken, tmp_path, Strike("fsync .", unbroken.events[:at + 1].count("fsync .")))


def strikes_at(events):
    """Every place for a kill: before each of the events, and in the midst of each file that is written."""
    for position, event in enumerate(events):
        number = events[:position + 1].count(event)
        yield Strike(event, number)
        if event.startswith("open "):
            yield Strike(event, number, event.removeprefix("open "))


@pytest.mark.slow
def test_a_run_that_is_killed_in_any_of_its_operations_goes_on(unbroken, tmp_path):
    for number, strike in enumerate(strikes_at(unbroken.events)):
        killed_run_goes_on(unbroken, tmp_path / str(number), strike)
    print(f"killed in {number + 1} places of {len(unbroken.events)} operations")


def test_a_run_that_is_killed_again_while_it_goes_on_from_a_damaged_state_goes_on(unbroken, tmp_path):
    """In any operation that moves aside the undone rows and the damaged state, and those of the first save."""
    def left(place):
        config = unbroken.config.replace(checkpoint_dir=str(tmp_path / place))
        if place != "killed":
            shutil.copytree(tmp_path / "killed", config.checkpoint_dir)
        return config

    assert in_a_child(left("killed"), Strike("step", 5))[0] == -signal.SIGKILL
    damage(folder_of(left("killed")) / "last.pt")
    code, events = in_a_child(left("once"))
    assert code == 0 and "rename last.pt last.pt.damaged-1" in events
    strikes = [strike for strike in strikes_at(events[:events.index("saved") + 1])
               if ".config.json" not in strike.event and ".summary.json" not in strike.event]      # These are as in any start
    for number, strike in enumerate(strikes):
        config = left(str(number))
        code, again = in_a_child(config, strike)
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ) and again == events[:len(again)]
        goes_on(unbroken, config, saved=3, after=f"a kill at {strike} while it went on")
    print(f"killed again in {len(strikes)} places")


@pytest.mark.parametrize("flow_case", FLOW_CASES, indirect=True)
def test_a_killed_run_goes_on_for_every_flow_and_augmentation(unbroken, tmp_path, flow_case):
    other = unbroken_run(unbroken.config.replace(**flow_case, batch_size=100, checkpoint_dir=str(tmp_path / "unbroken")))
    killed_run_goes_on(other, tmp_path, Strike("step", 5))


# ---- power cuts

def a_save_of(name, previous=()):
    return ["fsync metrics.jsonl", f"open .{name}.tmp", f"fsync .{name}.tmp", *previous, f"rename .{name}.tmp {name}", "fsync ."]


@pytest.mark.parametrize(("number", "operations"), [
    (1, a_save_of("last.pt")),
    (2, a_save_of("last.pt", ["rename last.pt previous.pt"])),
    (3, a_save_of("best.pt") + a_save_of("last.pt", ["rename last.pt previous.pt"])),
])
def test_a_save_flushes_the_record_then_the_file_then_renames_then_flushes_the_folder(unbroken, number, operations):
    start, end = nth(unbroken.events, "save", number), nth(unbroken.events, "saved", number)
    assert unbroken.events[start + 1:end] == operations


def test_a_new_folder_is_flushed_in_its_parent_before_anything_is_saved_in_it(unbroken):
    before = unbroken.events[:unbroken.events.index("save")]
    made = [event.removeprefix("mkdir ") for event in before if event.startswith("mkdir ")]
    assert made == ["..", "."]
    for name in made:
        assert f"fsync {os.path.normpath(f'{name}/..')}" in before[before.index(f"mkdir {name}"):]


def test_a_run_goes_on_after_a_power_cut_at_any_moment(unbroken, tmp_path):
    for number, (files, saved) in enumerate(unbroken.disks.items()):
        config = unbroken.config.replace(checkpoint_dir=str(tmp_path / str(number)))
        folder_of(config).mkdir(parents=True)
        for name, content in files:
            (folder_of(config) / name).write_bytes(content)
        goes_on(unbroken, config, saved, after=f"a power cut that left {({name: len(content) for name, content in files})}")
    print(f"went on from {len(unbroken.disks)} disks")


# ---- random moments in the life of the real command

KILLS, SEED = int(os.environ.get("FLOWBOOK_KILLS", 20)), int(os.environ.get("FLOWBOOK_TORTURE_SEED", 0))     # `make torture` draws a seed
KILLS_IN_A_RUN, STEPS = 20, 2500


@pytest.mark.slow
@pytest.mark.parametrize("number", range(-(-KILLS // KILLS_IN_A_RUN)))
def test_a_run_that_is_killed_at_random_moments_goes_on(flowbook, tmp_path, monkeypatch, number):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    choose, kills = random.Random(SEED + number), min(KILLS_IN_A_RUN, KILLS - number * KILLS_IN_A_RUN)
    flow = choose.choice([name for name in FLOWS if name != "reflow"])      # That one needs a run of another flow
    aug, batch = choose.choice(list(AUGMENTATIONS)), choose.choice([64, 100, 256])
    print(f"\nFLOWBOOK_TORTURE_SEED={SEED + number}: {flow}, {aug}, batches of {batch}, {kills} kills")
    assert flowbook("prepare", "moons", "--points", 5000).returncode == 0
    command = ["train", "--dataset", "moons-all", "--flow", flow, "--aug", aug, "--batch-size", batch, "--epochs", STEPS // (3500 // batch),
               "--seed", choose.randrange(1000), "--patience", 0, "--log-every", 7, "--arch-options", "width=32", "dropout=0.1",
               "--wandb-project", "None"]
    began = time.monotonic()
    assert flowbook(*command, "--checkpoint-dir", "unbroken", timeout=1800).returncode == 0
    unbroken, = (tmp_path / "unbroken").glob("mlp-*")
    seconds, folder, hits = read_summary(unbroken)["seconds"], tmp_path / "checkpoints" / unbroken.name, Counter()
    start = time.monotonic() - began - seconds

    for _ in range(kills):      # At moments that let about four fifths of the run go by
        with subprocess.Popen([COMMAND, *map(str, command), "--resume"], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
            hits[hit := strike_at_random(process, folder, start, seconds / kills, choose)] += 1
        others = newest_step(folder, ["previous.pt", "best.pt"])
        if choose.random() < 0.2 and "too late" not in hit and others and step_of(folder / "last.pt"):
            damage(folder / "last.pt", choose.randrange(10**6), choose.randrange(1, 256))
            hits["a byte of last.pt changed afterwards"] += 1
    print(*(f"  {count:3d} {what}" for what, count in sorted(hits.items())), sep="\n")
    assert sum(count for what, count in hits.items() if "in training" in what or "in a save" in what) >= kills // 10, "it was seldom hit"

    last = flowbook(*command, "--resume", timeout=1800)
    assert last.returncode == 0, last.stdout + last.stderr
    assert_same_run(unbroken, folder, f"FLOWBOOK_TORTURE_SEED={SEED + number}")
    assert len(list(folder.glob("last.pt.damaged-*"))) == hits["a byte of last.pt changed afterwards"]
    steps = [row["step"] for row in read_metrics(folder) if "train/loss" in row]
    assert steps == list(range(7, 7 * len(steps) + 1, 7))


def strike_at_random(process, folder, start, seconds, choose):
    """Send a command a signal at some moment, mostly SIGKILL in training. Returns what was hit, as far as can be seen from outside."""
    def trains():
        return read_summary(folder).get("process") == process.pid

    def wait_until(something, limit=600):
        end = time.monotonic() + limit
        while not something() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)

    def being_written():
        return any(path.exists() and path.stat().st_mtime > opened for path in (folder / ".last.pt.tmp", folder / ".best.pt.tmp"))

    number = choose.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [8, 1, 1])[0]
    moment = choose.choices(["from the start on", "in training", "in a save"], [1, 3, 1])[0] if number == signal.SIGKILL else "in training"
    opened = 0
    if moment == "from the start on":
        wait_until(lambda: False, choose.uniform(0, 1.2 * start))
    else:
        wait_until(trains)
        opened = time.time()
        wait_until(lambda: False, choose.uniform(0, 1.6 * seconds))
    if moment == "in a save":
        wait_until(being_written, 2)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code in {signal.SIGKILL: [-9, 0], signal.SIGTERM: [143, -15, 0], signal.SIGINT: [130, -2, 0]}[number]
    where = ("too late: the run was finished" if code == 0 or read_summary(folder).get("status") == "finished" else
             "before training began" if not trains() and number == signal.SIGKILL else
             "in a save" if opened and being_written() else "in training")
    return f"{number.name} {where}"


