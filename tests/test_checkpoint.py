"""Any change of a checkpoint is noticed, nothing in it is executed, and a failed save leaves the old one."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import assert_same
from flowbook.checkpoint import FORMAT, CheckpointError, read_checkpoint, write_checkpoint

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2**62, 2**62) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.builds(lambda n, seed: torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)), st.integers(0, 4), st.integers(0, 99)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner, max_size=3), max_leaves=8)


@settings(deadline=None, max_examples=50)
@given(contents=plain)
def test_any_plain_state_comes_back_equal(tmp_path_factory, contents):
    path = tmp_path_factory.mktemp("state") / "state.pt"
    write_checkpoint(path, {"format": FORMAT, "contents": contents})
    assert_same(read_checkpoint(path)["contents"], contents)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    write_checkpoint(path, {"format": FORMAT, "weights": torch.arange(300.0), "config": {"lr": 0.1}})
    return path


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_changed_byte_is_noticed(checkpoint, data):
    content = bytearray(checkpoint.read_bytes())
    place, change = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    content[place] ^= change
    damaged = checkpoint.with_name("damaged.pt")
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged.pt"):
        read_checkpoint(damaged)


def test_every_truncation_is_noticed(checkpoint):
    content, cut = checkpoint.read_bytes(), checkpoint.with_name("cut.pt")
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut.pt"):
            read_checkpoint(cut)


def test_a_failed_save_names_the_path_and_leaves_the_old_state(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not save .*last.pt \(.* MB are needed\): No space left on device"):
        write_checkpoint(checkpoint, {"format": FORMAT, "weights": torch.zeros(300)})
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob(".last.pt*"))


def test_torch_reads_a_sealed_file(checkpoint):
    assert torch.equal(torch.load(checkpoint, weights_only=True)["weights"], torch.arange(300.0))
