"""What W&B and the disk really hold after a run, and what a run costs when W&B is missing, unreachable or broken.

The offline record is read back from its `.wandb` file; the online one is what a small server on loopback was sent."""
import contextlib, errno, http.server, json, os, platform, random, signal, socket, subprocess, sys, textwrap, threading, time, warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import torch

from flowbook import tracking
from flowbook.config import TrainingConfig
from flowbook.tracking import METRICS_FILE, SUMMARY_FILE, NoRecord, RunRecord, open_record, read_metrics, rewind_metrics

KEY = "0" * 40


# ---- Fixtures and helpers

@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    "No setting, key or folder of the user's: W&B starts as on a fresh machine, and is shut down afterwards"
    for name in [name for name in os.environ if name.startswith("WANDB_")]: monkeypatch.delenv(name)
    for name in ("NETRC", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"): monkeypatch.delenv(name, raising=False)
    home = tmp_path/"home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(home)
    yield
    if "wandb" in sys.modules and sys.modules["wandb"] is not None:
        try: sys.modules["wandb"].teardown()
        except Exception: pass                      # a test may have killed its service

@pytest.fixture
def offline(monkeypatch): monkeypatch.setenv("WANDB_MODE", "offline")

@pytest.fixture
def config(tmp_path):
    return TrainingConfig(aug="mixup+noise", group="a study", seed=7, arch_options={"width": 64}, data_dir=str(tmp_path))

def caught(action, *arguments, **options):
    "What `action` returns, and the warnings it gave as text"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = action(*arguments, **options)
    return result, [str(warning.message) for warning in found if warning.category is UserWarning]

def log_steps(record, steps, epoch=1):
    for step in steps: record.log(step, epoch, **{"train/loss": 1 / step, "train/grad_norm": 1.0, "train/lr": 1e-3})

def records_in(data, position=7, record=b""):
    "The protocol buffers in a .wandb file: LevelDB's log format after a header of seven bytes"
    from wandb.proto.wandb_internal_pb2 import Record
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7: position += 32768 - position % 32768
        length, kind = int.from_bytes(data[position+4:position+6], "little"), data[position+6]
        record += data[position+7:position+7+length]
        position += 7 + length
        if kind in (1, 4) and position <= len(data):
            yield Record.FromString(record)
            record = b""

def values(items): return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

def read_back(folder):
    "What the .wandb file in `folder` says, once it is complete (W&B writes it in another process, after finish has returned)"
    path, = Path(folder).glob("*.wandb")
    for _ in range(2400):
        records = list(records_in(path.read_bytes()))
        if any(record.HasField("exit") for record in records): break
        time.sleep(.05)
    runs = [record.run for record in records if record.HasField("run")]
    summary = {}
    for record in records:
        if record.HasField("summary"): summary |= values(record.summary.update)
    return dict(run=runs[0], tags=list(runs[-1].tags), summary=summary,
                config={item.key: json.loads(item.value_json) for item in runs[0].config.update},
                history=[values(record.history.item) for record in records if record.HasField("history")],
                metrics=[record.metric for record in records if record.HasField("metric")],
                artifacts=[record.artifact for record in records if record.HasField("artifact")],
                exit_code=[record.exit.exit_code for record in records if record.HasField("exit")])


# ---- metrics.jsonl

def test_rows_are_lines_in_order_and_identical_runs_are_identical_files(tmp_path):
    for name in ("first", "second"):
        record = RunRecord(tmp_path/name)
        log_steps(record, range(10, 60, 10))
        record.log(50, 1, **{"val/loss": float("nan")})
        record.sync()
        record.finish({"final_epoch": 1})
    first, second = (tmp_path/name/METRICS_FILE for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert [row["step"] for row in read_metrics(first)] == [10, 20, 30, 40, 50, 50]
    assert list(json.loads(first.read_text().splitlines()[0])) == ["step", "epoch", "train/loss", "train/grad_norm", "train/lr"]
    assert json.loads(first.read_text().splitlines()[-1])["val/loss"] is None       # strict JSON: other readers can read it
    assert np.isnan(read_metrics(tmp_path/"first")[-1]["val/loss"])

def test_a_row_is_one_write_and_is_there_at_once(tmp_path):
    record, writes = RunRecord(tmp_path), []
    file = record._file
    class Counted:
        name, closed = file.name, False
        def write(self, line): writes.append(line); return file.write(line)
    record._file = Counted()
    log_steps(record, [1, 2])
    assert len(writes) == 2 and all(line.endswith(b"\n") for line in writes)
    assert (tmp_path/METRICS_FILE).read_bytes() == b"".join(writes)

def test_every_cut_of_the_record_resumes_with_each_step_once(tmp_path):
    whole = RunRecord(tmp_path/"whole")
    log_steps(whole, range(1, 7))
    whole.finish({})
    complete = (tmp_path/"whole"/METRICS_FILE).read_bytes()
    for cut in range(0, len(complete) + 1, 7):
        folder = tmp_path/str(cut)
        folder.mkdir()
        (folder/METRICS_FILE).write_bytes(complete[:cut])
        done = min(3, complete[:cut].count(b"\n"))                                  # rows are on the disk before a checkpoint is
        record = RunRecord(folder, step=done)
        log_steps(record, range(done + 1, 7))
        assert (folder/METRICS_FILE).read_bytes() == complete
        kept = b"".join(complete.splitlines(keepends=True)[:done])
        assert (record.undone.read_bytes() if record.undone else b"") == complete[len(kept):cut]

def test_damaged_rows_are_moved_aside_too(tmp_path):
    path = tmp_path/METRICS_FILE
    path.write_bytes(b'{"step": 1}\n{"st\xff\xfep": 2}\nnull\n{"step": "3"}\n{"step": 2}\n{"step": 9}\n')
    aside = rewind_metrics(path, 5)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert aside.read_bytes() == b'{"st\xff\xfep": 2}\nnull\n{"step": "3"}\n{"step": 9}\n'

def test_a_new_run_moves_rows_of_an_earlier_start_aside(tmp_path):
    (tmp_path/METRICS_FILE).write_bytes(b'{"step": 0}\n{"step": 1}\n')
    record = RunRecord(tmp_path)
    assert read_metrics(tmp_path) == [] and record.undone.name == "metrics-undone-after-step-0.jsonl"

def test_nothing_moved_aside_is_ever_overwritten(tmp_path):
    path, contents = tmp_path/METRICS_FILE, []
    for number in range(4):
        path.write_text(f'{{"step": 1}}\n{{"step": 2, "attempt": {number}}}\n')
        contents.append(rewind_metrics(path, 1).read_text())
    assert sorted(path.read_text() for path in tmp_path.glob("*undone*")) == sorted(contents) and len(set(contents)) == 4

@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("at", range(6))
def test_a_rewind_can_be_killed_anywhere(tmp_path, monkeypatch, call, at):
    path, before = tmp_path/METRICS_FILE, b'{"step": 1}\n{"step": 2}\n{"ste'
    path.write_bytes(before)
    class Killed(BaseException): pass
    original, calls = getattr(os, call), []
    def dies(*arguments, **options):
        calls.append(arguments)
        if len(calls) == at + 1: raise Killed
        return original(*arguments, **options)
    monkeypatch.setattr(os, call, dies)
    try: rewind_metrics(path, 1)
    except Killed: pass
    monkeypatch.undo()
    everything = path.read_bytes() + b"".join(path.read_bytes() for path in tmp_path.glob("*undone*"))
    assert all(line in everything for line in before.splitlines())
    rewind_metrics(path, 1)
    aside, = tmp_path.glob("*undone*")                                              # the second attempt finds the first one's work
    assert path.read_bytes() + aside.read_bytes() == before

def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    if not Path("/dev/full").exists(): pytest.skip("needs /dev/full")
    record = RunRecord(tmp_path)
    record._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match="No space left on device: a row of metrics could not be written") as caught_error:
        record.log(1, 1, **{"train/loss": 1.0})
    assert caught_error.value.errno == errno.ENOSPC and caught_error.value.filename == "/dev/full"

def test_a_failure_is_told_even_when_its_summary_cannot_be_written(tmp_path, monkeypatch):
    told = []
    class Listens(tracking.NoTracker):
        def close(self, summary, checkpoint_path=None): told.append(summary)
    record = RunRecord(tmp_path, tracker=Listens())
    def full(*arguments): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    _, messages = caught(record.fail, ValueError("the user's error"))
    assert len(messages) == 1 and "summary.json could not be written" in messages[0]
    assert told == [{"status": "failed", "error": "ValueError: the user's error"}]

def test_the_summary_says_how_it_ended(tmp_path):
    def status(): return json.loads((tmp_path/SUMMARY_FILE).read_text())
    record = RunRecord(tmp_path)
    assert status() == {"status": "running", "process": os.getpid(), "host": platform.node()}
    record.pause({"final_epoch": 1})
    assert status() == {"status": "interrupted", "final_epoch": 1}
    RunRecord(tmp_path, step=1).fail(RuntimeError("no"), {"final_epoch": 2})
    assert status() == {"status": "failed", "final_epoch": 2, "error": "RuntimeError: no"}
    record = RunRecord(tmp_path, step=1)
    record.finish({"status": "early-stopped", "best_val_loss": float("inf")}, tmp_path/"best.pt")
    record.fail(ValueError("too late: it is closed"))
    assert status() == {"status": "early-stopped", "best_val_loss": None, "checkpoint_path": str(tmp_path/"best.pt")}

def test_the_null_record_has_every_method():
    record = NoRecord()
    log_steps(record, [1])
    record.sync(); record.finish({}); record.pause({}); record.fail(ValueError())
    def public(kind): return {name for name in dir(kind) if not name.startswith("_")}
    assert public(NoRecord) == public(RunRecord)

def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path, config):
    (tmp_path/"file").touch()
    with pytest.raises(OSError, match="file"): open_record(tmp_path/"file"/"run", config)


# ---- W&B, offline

def test_rows_of_one_second_are_sent_together_and_none_is_lost(tmp_path, config, offline):
    record = open_record(tmp_path/"run", config, project="flowbook")
    log, sent = record.tracker.run.log, []
    def counted(row):
        sent.append(row)
        log(row)
    with patch.object(record.tracker.run, "log", counted):
        log_steps(record, range(1, 51))
        at_once = len(sent)
        time.sleep(1.1)
        log_steps(record, [51])
        assert at_once < 50 and len(sent) == 51
        log_steps(record, [52, 53])
        record.finish({})
    assert [row["step"] for row in sent] == list(range(1, 54))
    times = [row["_timestamp"] for row in sent]
    assert times == sorted(times) and times[50] - times[49] > 1
    assert [row["step"] for row in read_back(record.tracked_at)["history"]] == list(range(1, 54))

def test_what_is_in_the_offline_record(tmp_path, config, offline, capfd):
    checkpoint = tmp_path/"run"/"best.pt"
    record, messages = caught(open_record, tmp_path/"run", config, project="a project")
    checkpoint.write_bytes(b"weights")
    log_steps(record, [10, 20])
    record.log(25, 1, **{"val/loss": 0.5})
    record.finish({"final_epoch": 1, "best_val_loss": 0.5}, checkpoint)
    assert messages == [] and capfd.readouterr() == ("", "")
    assert Path(record.tracked_at).is_relative_to(tmp_path/"run"/"wandb")
    found = read_back(record.tracked_at)
    run = found["run"]
    assert (run.project, run.run_group, run.display_name, run.run_id) == (
        "a project", "a study", "mlp-icfm-digits-1k-mixup+noise-s7", record.wandb_run_id)
    expected = config.to_dict()
    assert {name: found["config"][name] for name in expected} == expected
    ours = [{name: value for name, value in row.items() if not name.startswith("_")} for row in found["history"]]
    assert ours == read_metrics(tmp_path/"run")
    assert [row["step"] for row in ours] == [10, 20, 25] and ours[-1] == {"step": 25, "epoch": 1, "val/loss": 0.5}
    assert any((metric.glob_name or metric.name) == "*" and metric.step_metric == "step" for metric in found["metrics"])
    assert found["summary"].items() >= {"status": "finished", "final_epoch": 1, "best_val_loss": 0.5,
                                        "checkpoint_path": str(checkpoint)}.items()
    assert found["tags"] == ["flowbook"] and found["exit_code"] == [0]
    artifact, = found["artifacts"]
    assert (artifact.name, artifact.type) == ("mlp-icfm-digits-1k-mixup-noise-s7", "model")
    assert [entry.path for entry in artifact.manifest.contents] == ["best.pt"]
    assert TrainingConfig.load(tmp_path/"run"/"config.json") == config
    assert not list((tmp_path/"home").rglob("*artifact*"))                          # no copy of the weights in the user's home

def test_resume_is_the_same_run_and_the_failed_tag_goes(tmp_path, config, offline):
    first = open_record(tmp_path/"run", config, project="flowbook")
    log_steps(first, [1, 2, 3])
    first.fail(FloatingPointError("the loss is NaN"), {"final_epoch": 1})
    second = open_record(tmp_path/"run", config.replace(epochs=500), project="flowbook", step=2, wandb_run_id=first.wandb_run_id)
    log_steps(second, [3, 4])
    second.finish({"final_epoch": 2, "best_val_loss": 0.1})
    before, after = read_back(first.tracked_at), read_back(second.tracked_at)
    assert before["run"].run_id == after["run"].run_id == first.wandb_run_id == second.wandb_run_id
    assert (before["tags"], before["exit_code"]) == (["flowbook", "failed"], [1])
    assert before["summary"]["error"] == "FloatingPointError: the loss is NaN" and before["summary"]["status"] == "failed"
    assert (after["tags"], after["exit_code"]) == (["flowbook"], [0])
    assert after["summary"].get("error") is None and after["summary"]["status"] == "finished"
    assert after["config"]["epochs"] == 500
    assert [row["step"] for row in after["history"]] == [3, 4]
    assert [row["step"] for row in read_metrics(tmp_path/"run")] == [1, 2, 3, 4]

def test_an_interrupted_run_has_not_failed(tmp_path, config, offline):
    record = open_record(tmp_path/"run", config, project="flowbook")
    log_steps(record, [1])
    record.pause({"final_epoch": 0})
    found = read_back(record.tracked_at)
    assert found["tags"] == ["flowbook"] and found["exit_code"] == [0] and found["summary"]["status"] == "interrupted"

def test_a_run_of_the_users_own_is_left_alone(tmp_path, config, offline):
    import wandb
    own = wandb.init(project="own", id="own", dir=tmp_path, settings=wandb.Settings(silent=True, console="off"))
    record = open_record(tmp_path/"run", config, project="flowbook")
    own.log({"mine": 1})
    log_steps(record, [1])
    record.finish({})
    assert wandb.run is own
    own.log({"mine": 2})
    own.finish()
    folder = Path(own.dir).parent
    assert [row["mine"] for row in read_back(folder)["history"]] == [1, 2]
    assert [row["step"] for row in read_back(record.tracked_at)["history"]] == [1]

def test_randomness_and_the_interpreters_hooks_are_untouched(tmp_path, config, offline):
    def state():
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    def hooks():
        return [sys.excepthook, sys.exit, sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state_before, hooks_before = state(), hooks()
    record = open_record(tmp_path/"run", config, project="flowbook")
    log_steps(record, [1, 2])
    (tmp_path/"best.pt").write_bytes(b"weights")
    record.finish({"final_epoch": 1}, tmp_path/"best.pt")
    assert state() == state_before and hooks() == hooks_before


# ---- W&B off, missing, broken

def in_a_process(code, tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    "Run `code` in a fresh interpreter, with `folder` and `config` at hand"
    start = f"from pathlib import Path; folder = Path({str(tmp_path)!r})\nfrom flowbook.config import TrainingConfig; " \
            f"config = TrainingConfig(data_dir=str(folder))\nfrom flowbook.tracking import *\nimport sys\n"
    root = Path(tracking.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    return subprocess.run([sys.executable, "-c", start + textwrap.dedent(code)], env=environment, stdin=stdin, stdout=stdout, stderr=stderr,
                          text=True, timeout=300)

def test_disabled_does_not_even_import_wandb(tmp_path):
    done = in_a_process("""
        record = open_record(folder/'run', config, project='flowbook', wandb_run_id='kept')
        record.log(1, 1, loss=1.); record.finish({})
        print('wandb' in sys.modules, record.wandb_run_id, record.tracked_at, sorted(p.name for p in (folder/'run').iterdir()))
        """, tmp_path, WANDB_MODE="disabled")
    assert (done.stdout, done.stderr) == ("False kept None ['config.json', 'metrics.jsonl', 'summary.json']\n", "")

NO_KEY = """
    record = open_record(folder/'run', config, project='flowbook')
    record.log(1, 1, loss=1.); record.finish({})
    print('offline-run' in record.tracked_at)
    """

def test_without_a_key_it_is_offline_and_nobody_is_asked(tmp_path):
    done = in_a_process(NO_KEY, tmp_path)
    assert (done.stdout, done.stderr) == ("True\n", "")

def test_without_a_key_nobody_is_asked_at_a_terminal_either(tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    in_a_process(NO_KEY, tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):      # Its other end is closed
        while piece := os.read(ours, 10_000): written += piece
    os.close(ours)
    assert written.decode().replace("\r\n", "\n") == "True\n"

def test_online_without_a_key_is_one_warning(tmp_path, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")
    record.finish({})
    assert messages == ["WANDB_MODE=online, but there is no key: type wandb login. The run is recorded offline"]

def check_only_the_file(tmp_path, config, record, messages, part):
    _, later = caught(log_steps, record, [1, 2, 3])
    _, last = caught(record.finish, {"final_epoch": 1})
    messages = messages + later + last
    assert len(messages) == 1 and part in messages[0], messages
    assert [row["step"] for row in read_metrics(tmp_path/"run")] == [1, 2, 3]
    assert json.loads((tmp_path/"run"/SUMMARY_FILE).read_text()) == {"status": "finished", "final_epoch": 1}

def test_wandb_missing(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")
    check_only_the_file(tmp_path, config, record, messages, "the run goes on without W&B (ModuleNotFoundError")
    assert record.wandb_run_id                                                      # for the day on which it is there again

@pytest.mark.parametrize("environment, part", [
    (dict(WANDB_MODE="nonsense"), "ValidationError"), (dict(WANDB_API_KEY="short"), "WANDB_API_KEY invalid")])
def test_wrong_settings(tmp_path, config, monkeypatch, environment, part):
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")
    check_only_the_file(tmp_path, config, record, messages, part)

def test_wandbs_folder_cannot_be_written(tmp_path, config, offline):
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"wandb").touch()
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")
    check_only_the_file(tmp_path, config, record, messages, "the run goes on without W&B")

def test_no_home(tmp_path, config, offline, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null/nowhere")
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")
    log_steps(record, [1])
    assert messages == [] and [row["step"] for row in read_metrics(tmp_path/"run")] == [1]

@pytest.mark.parametrize("method", ["log", "finish"])
def test_wandb_fails_in_the_middle(tmp_path, config, offline, monkeypatch, method):
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")
    def fails(*arguments, **options): raise RuntimeError("something inside W&B")
    monkeypatch.setattr(record.tracker.run, method, fails)
    check_only_the_file(tmp_path, config, record, messages, "W&B failed and is left out from here on (RuntimeError: something inside W&B)")

def test_wandbs_process_is_killed_in_the_middle(tmp_path, config, offline):
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")
    core, = [child for child in psutil.Process().children() if "wandb-core" in " ".join(child.cmdline())]
    core.kill()
    time.sleep(.3)
    check_only_the_file(tmp_path, config, record, messages, "W&B failed and is left out from here on")

def test_an_artifact_that_fails_does_not_keep_the_run_open(tmp_path, config, offline):
    record = open_record(tmp_path/"run", config, project="flowbook")
    _, messages = caught(record.finish, {"final_epoch": 1}, tmp_path/"not there.pt")
    assert len(messages) == 1 and "not there.pt" in messages[0]
    assert read_back(record.tracked_at)["exit_code"] == [0]


# ---- W&B, online

class Server(http.server.ThreadingHTTPServer):
    "As much of a W&B server as a run needs: it keeps what it was sent"
    daemon_threads = True
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.sent, self.stored, self.gone = [], None, False
        threading.Thread(target=self.serve_forever, daemon=True).start()
    url = property(lambda self: f"http://127.0.0.1:{self.server_port}")
    def variables(self, operation): return [variables for name, variables in self.sent if name == operation]
    def streamed(self): return [json.loads(body) for name, body in self.sent if name.endswith("file_stream")]

class Answers(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def do_GET(self): self.answer({}, 404)
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if self.server.gone: return self.answer({}, 503)
        if self.path != "/graphql":
            self.server.sent.append((self.path, body))
            return self.answer({})
        query = json.loads(body)
        operation, variables = query["operationName"], query.get("variables") or {}
        self.server.sent.append((operation, variables))
        project = dict(id="p", name=variables.get("project"), entity=dict(id="e", name="me"))
        bucket = dict(id="b", name=variables.get("name"), displayName=variables.get("displayName"), description=None, config=None,
                      sweepName=None, historyLineCount=0, project=project)
        answers = dict(RunResumeStatus=dict(model={**project, "bucket": self.server.stored}),
                       UpsertBucket=dict(upsertBucket=dict(bucket=bucket, inserted=True)))
        self.answer(dict(data=answers[operation]) if operation in answers else dict(errors=[dict(message="not known here")]))
    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    yield server
    server.shutdown()

@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_with_a_key_the_run_goes_to_the_server(tmp_path, config, server, monkeypatch, capfd, where):
    if where == "environment": monkeypatch.setenv("WANDB_API_KEY", KEY)
    else:
        (tmp_path/"home"/".netrc").write_text(f"machine 127.0.0.1:{server.server_port}\n  login user\n  password {KEY}\n")
        (tmp_path/"home"/".netrc").chmod(0o600)
    record, messages = caught(open_record, tmp_path/"run", config, project="a project")
    log_steps(record, [10, 20])
    record.finish({"final_epoch": 1, "best_val_loss": 0.5})
    assert messages == [] and capfd.readouterr() == ("", "")
    assert record.tracked_at == f"{server.url}/me/a%20project/runs/{record.wandb_run_id}"
    opened, *_, closed = server.variables("UpsertBucket")
    assert (opened["project"], opened["groupName"], opened["displayName"], opened["name"]) == (
        "a project", "a study", config.run_name, record.wandb_run_id)
    hyperparameters = {name: entry["value"] for name, entry in json.loads(opened["config"]).items() if name != "_wandb"}
    assert hyperparameters == {name: value for name, value in config.to_dict().items() if value != {}}      # W&B leaves empty ones out
    assert closed["tags"] == ["flowbook"]
    files = [(name, line) for sent in server.streamed() for name, part in sent.get("files", {}).items() for line in part["content"]]
    assert [json.loads(line)["step"] for name, line in files if name == "wandb-history.jsonl"] == [10, 20]
    assert json.loads([line for name, line in files if name == "wandb-summary.json"][-1])["final_epoch"] == 1
    assert server.streamed()[-1]["exitcode"] == 0

def test_an_online_resume_keeps_the_users_tags_and_drops_failed(tmp_path, config, server, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    first = open_record(tmp_path/"run", config, project="flowbook")
    log_steps(first, [1, 2])
    first.fail(ValueError("no"))
    assert server.variables("UpsertBucket")[-1]["tags"] == ["flowbook", "failed"] and server.streamed()[-1]["exitcode"] == 1
    server.stored = dict(id="b", name=first.wandb_run_id, displayName="x", historyLineCount=2, eventsLineCount=0, logLineCount=0,
                         historyTail='["{\\"_step\\": 1}"]', eventsTail="[]", summaryMetrics='{"error": "ValueError: no"}', config="{}",
                         tags=["mine", "flowbook", "failed"], wandbConfig='{"t": 1}')
    server.sent.clear()
    second = open_record(tmp_path/"run", config, project="flowbook", step=1, wandb_run_id=first.wandb_run_id)
    assert second.tracker.run.resumed
    log_steps(second, [2, 3])
    second.finish({"final_epoch": 1})
    assert server.variables("UpsertBucket")[-1]["tags"] == ["mine", "flowbook"] and server.streamed()[-1]["exitcode"] == 0
    summaries = [line for sent in server.streamed() for line in sent.get("files", {}).get("wandb-summary.json", {}).get("content", [])]
    assert json.loads(summaries[-1]).get("error") is None

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuses", "is silent"])
def test_an_unreachable_server_is_one_warning_and_a_bounded_wait(tmp_path, config, monkeypatch, kind):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    if kind == "is silent": listener.listen()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    record, messages = caught(open_record, tmp_path/"run", config, project="flowbook")     # Without a bound it would not come back
    check_only_the_file(tmp_path, config, record, messages, "W&B's server does not answer")
    listener.close()
    assert [row["step"] for row in read_back(record.tracked_at)["history"]] == [1, 2, 3]

@pytest.mark.slow
def test_a_server_that_goes_away_in_the_middle(tmp_path):
    server = Server()
    def leave():
        while not server.variables("UpsertBucket"): time.sleep(.01)
        time.sleep(1)
        server.gone = True
    threading.Thread(target=leave, daemon=True).start()
    done = in_a_process("""
        import time
        record = open_record(folder/'run', config, project='flowbook')
        for step in range(1, 31):
            record.log(step, 1, loss=1/step); time.sleep(.1)
        (folder/'best.pt').write_bytes(b'weights')
        record.finish({'final_epoch': 1}, folder/'best.pt')
        print([row['step'] for row in read_metrics(folder/'run')] == list(range(1, 31)))
        """, tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_FINISH_TIMEOUT="3")
    server.shutdown()
    assert done.stdout == "True\n" and done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1 and "W&B failed and is left out from here on" in done.stderr
