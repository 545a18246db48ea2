"""What the README says of other trainers' resuming, with the versions in constraints.txt: a claim that may go out of date."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from flowbook.data import FlowDataset
from flowbook.nets import create_model

pytestmark = pytest.mark.slow
EPOCH = 7       # steps of 100 points
STEPS = 2 * EPOCH


def points():
    return torch.randn(EPOCH * 100, 2, generator=torch.Generator().manual_seed(0))


def new_model():
    torch.manual_seed(0)
    model = create_model("mlp", (2,), width=16, depth=2)
    nn.init.normal_(model.last.weight)
    return model


def loss_of(model, x1):
    """Flow matching as it is usually written: noise and times from the global generator."""
    x0, t = torch.randn_like(x1), torch.rand(len(x1))
    return mse_loss(model(x0 + t[:, None] * (x1 - x0), t), x1 - x0)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("stop", [EPOCH, EPOCH - 2])
def test_lightning_resumes_another_run(tmp_path, stop):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = new_model()

        def training_step(self, batch):
            return loss_of(self.model, batch[0])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def fit(steps, resume=None):
        lightning.seed_everything(1, verbose=False)         # as a script does when it starts, the second time, too
        module = Module()
        trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
        trainer.fit(module, DataLoader(TensorDataset(points()), batch_size=100, shuffle=True), ckpt_path=resume)
        return trainer, module

    unbroken, again = fit(STEPS)[1], fit(STEPS)[1]
    assert torch.equal(weights(unbroken.model), weights(again.model))
    fit(stop)[0].save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = fit(STEPS, tmp_path / "stopped.ckpt")[1]
    assert not torch.equal(weights(resumed.model), weights(unbroken.model))


@pytest.mark.parametrize(("stop", "same"), [(EPOCH, True), (EPOCH - 2, False)])
def test_accelerate_resumes_the_same_run_between_epochs_only(tmp_path, stop, same):
    accelerate = pytest.importorskip("accelerate")

    def train(first, last, resume=None):
        accelerate.utils.set_seed(1)
        accelerator, model = accelerate.Accelerator(cpu=True), new_model()
        loader = DataLoader(TensorDataset(points()), batch_size=100, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
        if resume:
            accelerator.load_state(resume)
        step = first
        while step < last:
            behind = step % EPOCH
            for (x1,) in accelerator.skip_first_batches(loader, behind) if behind else loader:
                optimizer.zero_grad()
                accelerator.backward(loss_of(model, x1))
                optimizer.step()
                step += 1
                if step == last:
                    break
        return accelerator, weights(model)

    unbroken = train(0, STEPS)[1]
    assert torch.equal(unbroken, train(0, STEPS)[1])
    train(0, stop)[0].save_state(tmp_path / "stopped")
    assert torch.equal(train(stop, STEPS, tmp_path / "stopped")[1], unbroken) is same


@pytest.mark.parametrize("stop", [EPOCH, EPOCH - 2])
def test_flowbook_resumes_the_same_run(configured, new_trainer, stop):
    class Stop:
        def on_step(self, trainer):
            if trainer.step == stop:
                trainer.stop_request.request()

    data = FlowDataset.from_tensor(points())
    val = FlowDataset.from_tensor(points()[:100], stats=data.stats)

    def new(name, **options):
        config = configured(dataset="points", epochs=2, checkpoint_dir=f"{configured().checkpoint_dir}-{name}")
        return new_trainer(config, train_dataset=data, val_dataset=val, **options)

    unbroken = new("unbroken")
    unbroken.train()
    with pytest.raises(KeyboardInterrupt):
        new("stopped", callbacks=[Stop()]).train()
    resumed = new("stopped", resume_path="auto")
    resumed.train()
    assert unbroken.step == resumed.step == STEPS
    assert torch.equal(weights(resumed.model), weights(unbroken.model))
