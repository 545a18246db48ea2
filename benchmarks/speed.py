"""What a step of training costs, beside other trainers: `python benchmarks/speed.py [2d digits embeddings] [--rounds 8] [--device cpu]`.

Every contender trains the same network with Adam or AdamW on the same points, in one process, on one PyTorch thread. They take turns
of some tenths of a second, in another order each time, so that a machine that is now slow and now fast is so for all of them. The first
steps of a turn, in which the caches still hold the others' numbers, are not counted. A round is a number of turns. A ratio compares two
contenders in the same round; printed are medians over the rounds, and between which numbers the middle half of them lies. While the others
have their turns, a contender's clock stands still: what it does once a second, such as drawing a bar, sending rows or saving, it does
once in a second of its own.

The *floor* is what no trainer can leave out: noise, a forward and a backward pass and a fused AdamW, on one batch that stays where it is.
flowbook is `FlowTrainer.train()` as a user gets it: averaged weights, clipping, a schedule, a check of every step, and every ten steps a
row to metrics.jsonl and to Weights & Biases (offline). Left out is what it does between two epochs, validating and saving, which the
others don't do (`saving.py` measures it); the first step of an epoch is left out for all. The others average, clip, follow a schedule or
write rows where it says so. Their optimiser is fused where one has to choose it for the library anyway; the usual loop and TorchCFM's are
there with PyTorch's default, as people write them, and fused.
"""

import threading
import time

WAITED = threading.local()


def standing_still(clock):
    """A clock that leaves out what the thread that looks at it has waited for others."""
    return lambda: clock() - getattr(WAITED, "seconds", 0.0)


time.time, time.monotonic = standing_still(time.time), standing_still(time.monotonic)       # Before others import them

# ruff: noqa: E402
import argparse
import contextlib
import io
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch
from saving import machine
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from flowbook.config import TrainingConfig
from flowbook.data import FlowDataset
from flowbook.device import device_name, select_device
from flowbook.trainer import FlowTrainer

RESULTS = Path(__file__).with_name("results") / "speed.json"
WORKLOADS = {"2d": (2, 64, 256), "digits": (64, 256, 128), "embeddings": (384, 1024, 256)}      # Numbers of a point, width, batch
TURNS = {"2d": (4, 400, 40), "digits": (4, 60, 20), "embeddings": (2, 20, 10)}     # In a round; steps of each; how many of them don't count


class Network(nn.Module):
    """The usual small network of the field: four linear layers and SELU between them, as in TorchCFM's tutorials."""
    def __init__(self, features, width):
        super().__init__()
        sizes = [features + 1, width, width, width, features]
        layers = [layer for pair in zip(sizes, sizes[1:]) for layer in (nn.Linear(*pair), nn.SELU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x, t, cond=None): return self.layers(torch.cat([x, t[:, None]], 1))


class Contender(threading.Thread):
    """A training loop in a thread that runs only in its turns, and tells of the end of every step."""
    def __init__(self, train, work, turns):
        super().__init__(daemon=True)
        self.train, self.work, self.steps, self.step = train, work, turns * work.steps, 0
        self.may_go, self.has_stopped, self.error = threading.Semaphore(0), threading.Semaphore(0), None

    def turn(self):
        """Have it make so many steps; returns the microseconds of one."""
        self.seconds, self.counted, self.last = 0.0, 0, None
        self.may_go.release()
        self.has_stopped.acquire()
        if self.error: raise self.error
        return 1e6 * self.seconds / self.counted

    def wait(self):
        start = time.perf_counter()
        self.may_go.acquire()
        WAITED.seconds = getattr(WAITED, "seconds", 0.0) + time.perf_counter() - start

    def run(self):
        self.wait()
        try:
            with tempfile.TemporaryDirectory() as folder: self.train(self.work, self, Path(folder))
            if self.step < self.steps: raise RuntimeError(f"it ended after {self.step} of {self.steps} steps")
        except BaseException as error: self.error = error
        finally: self.has_stopped.release()

    def tick(self):
        """A step is done."""
        self.step += 1
        place = self.step % self.work.steps or self.work.steps
        if place in (self.work.uncounted, self.work.steps): self.work.finish()
        now = time.perf_counter()
        if place > self.work.uncounted and self.last is not None and self.step % self.work.epoch != 1:
            self.seconds += now - self.last
            self.counted += 1
        if place == self.work.steps and self.step < self.steps:
            self.has_stopped.release()
            self.wait()
        self.last = time.perf_counter()

def loss_of(model, x1):
    """Flow matching as it is usually written."""
    x0, t = torch.randn_like(x1), torch.rand(len(x1), device=x1.device)
    x_t = x0 + t[:, None] * (x1 - x0)
    return mse_loss(model(x_t, t), x1 - x0)


class Workload:
    """The network, the points and the batch of one size."""
    def __init__(self, name, device, points=10_000):
        self.device = device
        (self.features, self.width, self.batch), (_, self.steps, self.uncounted) = WORKLOADS[name], TURNS[name]
        points = torch.randn(points, self.features, generator=torch.Generator().manual_seed(0)) * 2 + 1
        self.data = FlowDataset.from_tensor(points)
        self.epoch = len(points) // self.batch
        self.x1, self.val = self.data.tensor.to(device), FlowDataset.from_tensor(points[:256], self.data.stats)

    def model(self):
        torch.manual_seed(0)
        return Network(self.features, self.width).to(self.device)

    def finish(self):
        """A GPU works on after the program has gone on: wait for it."""
        if self.device.type == "cuda": torch.cuda.synchronize()

    def loader(self): return DataLoader(TensorDataset(self.x1.cpu()), batch_size=self.batch, shuffle=True, drop_last=True)


def batches(loader, device):
    """Epoch after epoch, on a device."""
    while True: yield from (x1.to(device, non_blocking=True) for x1, in loader)


def floor(work, clock, folder):
    """Forward, backward and fused AdamW on one batch."""
    model, x1 = work.model(), work.x1[:work.batch]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(clock.steps):
        loss = loss_of(model, x1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.tick()


class Ticks:
    """A callback of `FlowTrainer`."""
    def __init__(self, clock): self.clock = clock

    def on_step(self, trainer):
        self.clock.tick()
        if self.clock.step == self.clock.steps: trainer.stop_request.request()


def flowbook(work, clock, folder, flow="icfm", **options):
    """`FlowTrainer.train()`, with W&B offline."""
    steps = len(work.x1) // work.batch
    config = TrainingConfig(flow=flow, dataset="points", batch_size=work.batch, epochs=-(-clock.steps // steps), warmup_steps=10,
                            patience=0, checkpoint_dir=str(folder), device=str(work.device), flow_options=options)
    trainer = FlowTrainer(work.model(), config, work.data, work.val, callbacks=[Ticks(clock)])
    with contextlib.suppress(KeyboardInterrupt): trainer.train()
    if not list(folder.rglob("*.wandb")): raise RuntimeError("Weights & Biases has recorded nothing")


def usual(work, clock, folder, fused=None):
    """The loop that most repositories have: DataLoader, clipping, cosine, an average weight by weight, each loss as a number."""
    model = work.model()
    average, total = deepcopy(model), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, clock.steps)
    for _, x1 in zip(range(clock.steps), batches(work.loader(), work.device)):
        loss = loss_of(model, x1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for mine, its in zip(average.parameters(), model.parameters()): mine.mul_(0.999).add_(its, alpha=0.001)
        total += loss.item()
        clock.tick()


def torchcfm(work, clock, folder, matcher="ConditionalFlowMatcher", fused=None):
    """The loop of TorchCFM's tutorials: Adam, no average, no clipping, no schedule."""
    from torchcfm import conditional_flow_matching
    model, matcher = work.model(), getattr(conditional_flow_matching, matcher)(sigma=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    for _ in range(clock.steps):
        optimizer.zero_grad()
        x1 = work.x1[torch.randint(len(work.x1), (work.batch,), device=work.device)]
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        loss = torch.mean((model(x_t, t) - u_t)**2)
        loss.backward()
        optimizer.step()
        clock.tick()


def torchcfm_ot(work, clock, folder): torchcfm(work, clock, folder, "ExactOptimalTransportConditionalFlowMatcher")


def lightning(work, clock, folder, shown=False):
    """Lightning with its EMA callback and clipping; no checkpoints. `shown`: with its bar, and a row to a CSV file every ten steps."""
    import lightning
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = work.model()

        def training_step(self, batch):
            loss = loss_of(self.model, batch[0])
            if shown: self.log("train/loss", loss)
            return loss

        def configure_optimizers(self): return torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    class LightningTicks(Callback):
        def on_train_batch_end(self, *arguments): clock.tick()

    accelerator = "gpu" if work.device.type == "cuda" else "cpu"
    trainer = lightning.Trainer(max_steps=clock.steps, accelerator=accelerator, devices=1, logger=shown and CSVLogger(folder),
                                log_every_n_steps=10, enable_progress_bar=shown, enable_checkpointing=False, enable_model_summary=False,
                                gradient_clip_val=1.0, default_root_dir=folder,
                                callbacks=[EMAWeightAveraging(decay=0.999), LightningTicks()])
    trainer.fit(Module(), work.loader())


def lightning_shown(work, clock, folder): lightning(work, clock, folder, shown=True)


def accelerate(work, clock, folder):
    """accelerate with ema-pytorch and clipping."""
    from accelerate import Accelerator
    from ema_pytorch import EMA
    accelerator, model = Accelerator(cpu=work.device.type == "cpu"), work.model()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), work.loader())
    average = EMA(accelerator.unwrap_model(model), beta=0.999, update_every=1)
    for _, x1 in zip(range(clock.steps), batches(loader, work.device)):
        loss = loss_of(model, x1)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update()
        clock.tick()


def hugging_face(work, clock, folder):
    """transformers' Trainer with clipping and a cosine; no average, no rows."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = work.model()

        def forward(self, x1): return {"loss": loss_of(self.model, x1)}

    class TrainerTicks(TrainerCallback):
        def on_step_end(self, *arguments, **options): clock.tick()

    points = work.x1.cpu()

    class Points(torch.utils.data.Dataset):
        def __len__(self): return len(work.x1)
        def __getitem__(self, index): return {"x1": points[index]}

    arguments = TrainingArguments(
        str(folder), max_steps=clock.steps, per_device_train_batch_size=work.batch, learning_rate=1e-3, lr_scheduler_type="cosine",
        use_cpu=work.device.type == "cpu", report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
        dataloader_drop_last=True, optim="adamw_torch_fused")
    Trainer(Module(), arguments, train_dataset=Points(), callbacks=[TrainerTicks()]).train()


def usual_fused(work, clock, folder): usual(work, clock, folder, fused=True)
def torchcfm_fused(work, clock, folder): torchcfm(work, clock, folder, fused=True)
def flowbook_ot(work, clock, folder): flowbook(work, clock, folder, "otcfm")
def flowbook_semidiscrete(work, clock, folder): flowbook(work, clock, folder, "semidiscrete")


MANY = {"floor": floor, "flowbook": flowbook, "torchcfm": torchcfm, "torchcfm, fused": torchcfm_fused, "usual loop": usual,
        "usual loop, fused": usual_fused, "accelerate": accelerate, "Hugging Face": hugging_face, "Lightning": lightning,
        "Lightning, bar and rows": lightning_shown, "flowbook, otcfm": flowbook_ot, "torchcfm, OT": torchcfm_ot}
FIRST_OF_FEW = "flowbook, 1,000 points"
FEW = {FIRST_OF_FEW: flowbook, "semidiscrete, 1,000 points": flowbook_semidiscrete}


def measure(name, rounds, device):
    """Microseconds of a step of every contender, round by round."""
    many, few, size = Workload(name, device), Workload(name, device, 1_000), TURNS[name][0]
    turns = size * rounds + 1       # The first is for getting ready
    contenders = {contender: Contender(train, many, turns) for contender, train in MANY.items()}
    contenders |= {contender: Contender(train, few, turns) for contender, train in FEW.items()}
    for contender in contenders.values(): contender.start()
    times, screen = {contender: [] for contender in contenders}, sys.stdout
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for turn in range(turns):
            for contender in random.sample(list(contenders), len(contenders)): times[contender].append(contenders[contender].turn())
            print(f"\r{name}: turn {turn} of {turns - 1}", end="", file=screen, flush=True)
    print()
    return {contender: [round(sum(values[k:k + size]) / size, 1) for k in range(1, turns, size)] for contender, values in times.items()}


def ratio(times, one, other):
    """Median over the rounds of the ratio of two contenders, and the quartiles."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return median(ratios), low, high


def show(times):
    """Print a workload's table."""
    print(f"{'':28}{'µs a step':>10}{'/ floor':>9}{'':16}{'/ flowbook':>10}")
    for contender, values in times.items():
        cells = [f"{middle:{width}.2f} ({low:.2f} to {high:.2f})" for width, (middle, low, high) in
                 ((8, ratio(times, contender, "floor")), (9, ratio(times, contender, "flowbook" if contender in MANY else FIRST_OF_FEW)))]
        print(f"{contender:28}{median(values):10.0f}{''.join(cells)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=f"some of {', '.join(WORKLOADS)}; all when none is given")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: then the results go to speed-cuda.json")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    for name in options.workloads:
        if name not in WORKLOADS: parser.error(f"workload {name!r} is unknown: it must be one of {', '.join(WORKLOADS)}")
    device = select_device(options.device)
    path = options.results or RESULTS.with_stem("speed" if device.type == "cpu" else f"speed-{device.type}")
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "offline"
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "transformers"): logging.getLogger(name).setLevel(logging.ERROR)
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.workloads:
        times = measure(name, options.rounds, device)
        show(times)
        peers = {peer: version(peer) for peer in ("torchcfm", "lightning", "accelerate", "ema-pytorch", "transformers", "wandb")}
        results[name] = {"machine": machine() | peers | {"device": device_name(device)}, "microseconds": times}
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
