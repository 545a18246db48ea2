"What the chapters on sources and data can't show: broken and hostile files, kills, two processes at once, properties over many inputs."
import errno, fcntl, os, pickle, signal, struct, subprocess, sys, tempfile, zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as distributions
from flowbook import data
from flowbook.config import STATS_FILE, prepared_sources
from flowbook.data import (AUGMENTATIONS, FlowDataset, NormalizationStats, count_of_size, create_augmentation, create_dataloader,
                           prepare_dataset, split_points, symmetric_beta)
from flowbook.randomness import Randomness
from flowbook.sources import READERS, SAMPLERS, read_points

BAD = "values are NaN, infinite or too large for float32, the first is"
POINTS = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")


class Trap:
    "A pickle of this makes a file called `executed` in the current folder when it is read"
    def __reduce__(self): return os.mkdir, ("executed",)


def write(path, values=POINTS):
    "A good file of any known format"
    if path.suffix == ".npy": np.save(path, values)
    elif path.suffix == ".npz": np.savez_compressed(path, x=values)
    elif path.suffix == ".pt": torch.save(torch.from_numpy(values), path)
    elif path.suffix == ".csv": np.savetxt(path, values, delimiter=",", header="a,b,c", comments="", fmt="%.9g")
    else:
        from safetensors.torch import save_file
        save_file({"x": torch.from_numpy(values)}, path)
    return path


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists(), "a hostile file was executed"


def refused(path, *words):
    "Both doors refuse the file, naming it, and nothing is left behind"
    for read in (read_points, prepare_dataset):
        with pytest.raises(ValueError) as error: read(path)
        message = str(error.value)
        assert str(path) in message and all(word in message for word in words), message
        assert "weights_only=False" not in message
    assert not Path("datasets").exists()


# Files

@pytest.mark.parametrize("ending", READERS)
def test_every_format_gives_the_same_points(ending):
    path = write(Path(f"mine{ending}"))
    assert torch.equal(read_points(path), torch.from_numpy(POINTS))
    assert torch.equal(read_points(path.rename(f"mine{ending.upper()}")), torch.from_numpy(POINTS))
    prepared = prepare_dataset(f"mine{ending.upper()}")
    assert prepared.counts == {"train": 28, "validation": 4, "test": 8} and prepared.data_shape == (3,)


@pytest.mark.parametrize("ending", READERS)
@pytest.mark.parametrize("damage", ["empty", "truncated", "half", "noise", "text", "pickle", "zeros"])
def test_broken_files_are_refused(ending, damage):
    path = write(Path(f"mine{ending}"))
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[:-3], "half": whole[:len(whole) // 2], "noise": bytes(range(256)) * 9,
                      "text": b"this is not data\nat all,really\n", "pickle": pickle.dumps(Trap()), "zeros": bytes(500)}[damage])
    if ending == ".csv" and damage == "truncated": path.write_text("a,b\n1,2\n3")
    if ending == ".csv" and damage == "half": path.write_bytes("a,b\n1,é\n".encode("latin-1"))
    refused(path)


@pytest.mark.parametrize("ending", READERS)
def test_every_format_under_the_wrong_ending_is_refused(ending):
    path = write(Path(f"mine{ending}"))
    for other in set(READERS) - {ending}:
        disguised = Path(f"disguised{other}")
        disguised.write_bytes(path.read_bytes())
        refused(disguised)


def test_pickles_are_never_executed():
    objects = np.array([Trap()], dtype=object)
    np.save("a.npy", objects)
    np.savez("b.npz", x=objects)
    torch.save(Trap(), "c.pt")
    torch.save({"x": torch.zeros(20, 2), "more": Trap()}, "d.pt")
    torch.save(Trap(), "e.pt", _use_new_zipfile_serialization=False)
    structured = np.zeros(3, dtype=[("a", "f4"), ("b", object)])
    np.save("f.npy", structured)
    for path in sorted(Path().glob("?.*")): refused(path)
    for path in Path().glob("*.pt"):
        with pytest.raises(ValueError): NormalizationStats.load(path)


def npy_claiming(shape, dtype="<f8", body=bytes(64)):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize("shape", ["(10**13, 3)", "(10000000000000, 3)", "(4611686018427387904, 4)", "(-4, -2)", "(-1, 2)", "(2,)*9999",
                                   "(0, 5)", "(4, 0)", "'x'", "(1.5, 2)", "(" * 200])
def test_absurd_npy_headers_are_refused(shape):
    Path("a.npy").write_bytes(npy_claiming(shape))
    refused(Path("a.npy"))
    with zipfile.ZipFile("a.npz", "w") as archive: archive.writestr("x.npy", npy_claiming(shape))
    refused(Path("a.npz"))


def patched_sizes(path, size):
    "The zip archive with another declared size for every member, in the central directory and the local headers"
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        place = content.find(signature)
        while place >= 0:
            content[place + offset:place + offset + 4] = struct.pack("<I", size)
            place = content.find(signature, place + 4)
    path.write_bytes(content)


@pytest.mark.parametrize("ending", [".npz", ".pt"])
def test_absurd_sizes_of_archive_members_are_refused(ending):
    path = write(Path(f"mine{ending}"))
    patched_sizes(path, 4_000_000_000)
    refused(path, "more than this file can hold")


def test_a_safetensors_header_that_claims_too_much_is_refused():
    for claim in (b'{"x":{"dtype":"F32","shape":[1000000000000,2],"data_offsets":[0,8000000000000]}}', b"{" * 1000):
        Path("a.safetensors").write_bytes(struct.pack("<Q", len(claim)) + claim + bytes(64))
        refused(Path("a.safetensors"))
    Path("a.safetensors").write_bytes(struct.pack("<Q", 2**60) + bytes(64))
    refused(Path("a.safetensors"))


@pytest.mark.parametrize("ending", [".npz", ".pt"])
def test_a_flipped_bit_in_an_archive_is_noticed_or_harmless(ending):
    path = write(Path(f"mine{ending}"))
    whole = path.read_bytes()
    for place in np.random.default_rng(0).choice(len(whole), 200, replace=False):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        try: points = read_points(path)
        except ValueError: continue
        assert torch.equal(points, torch.from_numpy(POINTS))


def test_tensors_that_are_no_plain_arrays_are_refused():
    contents = [torch.zeros(20, 2).to_sparse(), torch.zeros(1, 2).expand(10**6, 2), torch.zeros(20, 2, dtype=torch.complex64),
                torch.zeros(20, 2, dtype=torch.bool), torch.zeros(20, 2, device="meta"), [torch.zeros(20, 2)], "text", {}, {"x": "text"}]
    for content in contents:
        torch.save(content, "a.pt")
        refused(Path("a.pt"))
    torch.save({"x": torch.zeros(20, 2), "y": torch.zeros(20)}, "a.pt")
    refused(Path("a.pt"), "it must hold one array, not 2: x, y")


def test_archive_members_that_climb_out_are_only_names(tmp_path):
    with zipfile.ZipFile("a.npz", "w") as archive: archive.writestr("../../outside.npy", write(Path("mine.npy")).read_bytes())
    before = set(tmp_path.parent.rglob("*"))
    assert len(read_points("a.npz")) == 40
    assert set(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("values, words", [
    (np.float32(3), "shape ()"), (np.zeros(5), "x.reshape(-1, 1) has shape (5, 1)"),
    (np.zeros((2, 3, 4, 5, 6)), "shape (2, 3, 4, 5, 6)"),
    (np.zeros((20, 28, 28, 1)), "channels last"), (np.zeros((20, 32, 32, 3)), "channels last"), (np.zeros((20, 2), bool), "bool"),
    (np.zeros((20, 2), complex), "complex128"), (np.full((20, 2), "a"), "<U1"), (np.zeros((20, 2), "M8[s]"), "datetime64"),
    (np.zeros(20, [("a", "f4")]), "float"), (np.zeros((0, 2)), "no points"), (np.zeros((20, 0)), "no points"),
    (np.where(np.arange(40).reshape(20, 2) == 7, np.nan, 1.), f"1 of 40 {BAD} nan in row 3, feature 1"),
    (np.where(np.arange(40).reshape(20, 2) > 37, -np.inf, 1), f"2 of 40 {BAD} -inf in row 19, feature 0"),
    (np.full((20, 1, 2, 2), 1e39), f"80 of 80 {BAD} 1e+39 in row 0, feature (0, 0, 0)"),
    (np.zeros((9, 2)), "9 points are too few to split: at least 10"),
])
def test_arrays_that_are_no_points_are_refused(values, words):
    np.save("mine.npy", values)
    with pytest.raises(ValueError) as error: prepare_dataset("mine.npy")
    assert words in str(error.value)
    assert not Path("datasets").exists()


@pytest.mark.parametrize("values, shape", [
    (np.zeros((12, 28, 28), "uint8"), (12, 1, 28, 28)), (np.zeros((12, 3, 8, 8), "int64"), (12, 3, 8, 8)),
    (np.zeros((12, 2), ">f8"), (12, 2)),
    (np.zeros((12, 2), "uint16"), (12, 2)), (np.zeros((12, 2), "float16"), (12, 2)), (np.zeros((2, 12)).T, (12, 2)),
    (np.zeros((12, 64, 1, 1)), (12, 64, 1, 1)), (np.zeros((12, 16, 3, 3)), (12, 16, 3, 3))])
def test_arrays_that_are_points(values, shape):
    np.save("mine.npy", values)
    points = read_points("mine.npy")
    assert points.shape == shape and points.dtype == torch.float32 and points.is_contiguous()


def test_bfloat16_and_int8_tensors_are_points():
    from safetensors.torch import save_file
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float64):
        torch.save(torch.ones(3, 2, dtype=dtype, requires_grad=dtype.is_floating_point), "a.pt")
        save_file({"x": torch.ones(3, 2, dtype=dtype)}, "a.safetensors")
        assert torch.equal(read_points("a.pt"), torch.ones(3, 2)) and torch.equal(read_points("a.safetensors"), torch.ones(3, 2))


@pytest.mark.parametrize("text, words", [
    ("a,b\n1,2\n3,x\n", "line 3, column 2: 'x' is not a number"), ("1,2\n\n3,\n", "line 3, column 2: '' is not a number"),
    ("1;2\n3;4\n", "line 2, column 1: '3;4' is not a number (columns are separated by commas)"),
    ("1,2\n3,4,5\n", "line 2 has 3 columns, and the first has 2"),
    ("x,1\n3,4\n", "line 1, column 1: 'x' is not a number"), (",a\n0,1\n", "index column"), ("0,1,2\n5,6,7\n", "line 1 counts 0, 1, 2"),
    ("a,b\n", "no points"), ("\n\n", "no points"), ("a,b\n1,nan\n", "1 of 2 values are NaN"), ("a,b\n1,1e999\n", "first is inf"),
    ("a\x00,b\n1,2\n\x001,2\n", ""),
    ("a," + "b" * 200_000 + "\n1,2\n", "field")])
def test_csv_says_where(text, words):
    Path("mine.csv").write_text(text)
    refused(Path("mine.csv"), words)


def test_csv_as_people_write_it():
    for text in ("a,b\n1,2\n3,4", "1,2\n3,4\n", "\ufeffa,b\r\n1,2\r\n3,4\r\n", '"a","b"\n"1"," 2"\n3 ,4e0\n\n', "1,2\n\n3,4\n\n"):
        Path("mine.csv").write_bytes(text.encode())
        assert read_points("mine.csv").tolist() == [[1, 2], [3, 4]]


def test_files_that_are_no_files():
    Path("folder.npy").mkdir()
    Path("notes.txt").write_text("hello")
    Path("bare").write_text("hello")
    for source, error, words in (("missing.npy", FileNotFoundError, "there is no file missing.npy"),
                                 ("folder.npy", IsADirectoryError, "is a folder"), ("bare", ValueError, "ending in nothing"),
                                 ("notes.txt", ValueError, "files ending in .txt are not known; known are .npy"),
                                 ("mons", ValueError, "did you mean 'moons'?"), (".", IsADirectoryError, "folder")):
        with pytest.raises(error) as caught: prepare_dataset(source)
        assert words in str(caught.value)
    assert not Path("datasets").exists()


# Preparing

@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", ".", "", ".hidden", "-x", "a b", "a\nb", "ünder", "my-1k", "500", "all",
                                  "x-all", 7])
def test_names_that_could_climb_or_confuse_are_refused(name, tmp_path):
    before = set(tmp_path.parent.rglob("*"))
    with pytest.raises(ValueError, match="is not allowed"): prepare_dataset("moons", name=name, points=20)
    with pytest.raises(ValueError, match="is not allowed"): FlowDataset("datasets", name, "all")
    assert set(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("arguments, words", [
    (dict(points=9), "points=9"), (dict(points=True), "points=True"), (dict(points=1e4), "points=10000.0"),
    (dict(points=10**15), "100,000,000"), (dict(seed=-1), "seed=-1"), (dict(seed=2**32), "seed="), (dict(seed="0"), "seed='0'"),
    (dict(sizes=["50k"]), "there are 7,000 training points"),
    (dict(sizes=["0"]), "size='0'"), (dict(sizes=["1.5k"]), "size='1.5k'"), (dict(source="digits", points=50), "not digits")])
def test_arguments_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(ValueError) as error: prepare_dataset(**{"source": "moons"} | arguments)
    assert words in str(error.value)
    assert not Path("datasets").exists()


@pytest.mark.parametrize("source", SAMPLERS)
def test_drawn_shapes(source):
    prepared = prepare_dataset(source, points=1000, seed=3)
    assert prepared.counts == {"train": 700, "validation": 100, "test": 200}
    assert prepared.data_shape == (2,) and list(prepared.sizes) == ["all"]
    again = prepare_dataset(source, points=1000, seed=3, data_dir="elsewhere")
    for path in Path("datasets", source).iterdir(): assert path.read_bytes() == Path("elsewhere", source, path.name).read_bytes()
    assert again.digest != prepare_dataset(source, points=1000, seed=4, name="other").digest


def test_the_same_again_wherever_the_file_lies_and_something_else():
    first = prepare_dataset(write(Path("mine.npy")))
    assert first.new and not prepare_dataset("mine.npy").new
    Path("deep").mkdir()
    assert not prepare_dataset(write(Path("deep/mine.csv"))).new
    write(Path("mine.npy"), POINTS[::-1].copy())
    before = Path("datasets/mine/train.npy").read_bytes()
    for change in (dict(), dict(seed=1)):
        with pytest.raises(FileExistsError, match="already holds 40 points from mine.npy, seed 0.*not the same.*choose another name"):
            prepare_dataset("mine.npy", **change)
    assert Path("datasets/mine/train.npy").read_bytes() == before
    assert prepare_dataset("mine.npy", name="mine.v2").new


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "{", '{"data_shape": 3}', "[" * 100_000, '{"data_shape": [], "surprise": 1}'])
def test_a_folder_that_is_no_data_set_is_left_alone(content):
    folder = Path("datasets/moons")
    folder.mkdir(parents=True)
    if content is not None:
        prepare_dataset("moons", points=20, name="other")
        for path in Path("datasets/other").iterdir(): path.rename(folder/path.name)
        (folder/"dataset.json").write_text(content)
    before = sorted(folder.iterdir())
    with pytest.raises(FileExistsError, match="datasets/moons is there already.*or remove the folder"): prepare_dataset("moons", points=20)
    assert sorted(folder.iterdir()) == before


def test_missing_and_damaged_parts_of_a_prepared_data_set():
    prepare_dataset("moons", points=100)
    folder = Path("datasets/moons")
    whole = (folder/"train.npy").read_bytes()
    with pytest.raises(ValueError, match="split='val' is not allowed"): FlowDataset("datasets", "moons", "all", "val")
    with pytest.raises(FileNotFoundError, match="type: flowbook prepare FILE --name mine --data-dir datasets"):
        FlowDataset("datasets", "mine", "all")
    for damaged in (b"", whole[:-8], whole[:50], pickle.dumps(Trap()), npy_claiming("(10000000000, 2)", "<f4"), npy_claiming("(8, 1)")):
        (folder/"train.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match="train.npy is damaged.*prepare again"): FlowDataset("datasets", "moons", "all")
    (folder/"train.npy").write_bytes(whole)
    for damaged in (b"", b"x" * 100, pickle.dumps(Trap())):
        (folder/STATS_FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="holds no normalisation statistics"): FlowDataset("datasets", "moons", "all")
    (folder/STATS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="no normalisation statistics at"): FlowDataset("datasets", "moons", "all")
    with pytest.raises(FileExistsError, match="without normalization_stats.pt"): prepare_dataset("moons", points=100)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import flowbook.data as data
call, countdown = {call!r}, {count}
real = getattr(os, call)
def dying(*arguments, **options):
    global countdown
    countdown -= 1
    if countdown == 0 and not {after}: os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **options)
    if countdown == 0: os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(os, call, dying)
data.prepare_dataset("moons", points=200)
"""


def run(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("call, count, after", [("fsync", 1, False), ("replace", 2, False), ("replace", 4, True), ("fsync", 10, True),
                                                ("rename", 1, False), ("rename", 1, True)])
def test_a_kill_in_the_middle_leaves_nothing_half(call, count, after):
    killed = run(KILLED.format(path=sys.path, call=call, count=count, after=after))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = (call, after) == ("rename", True)
    assert prepared_sources("datasets") == (["moons"] if whole else [])
    assert Path("datasets/moons").exists() == whole
    assert prepare_dataset("moons", points=200).new != whole
    prepare_dataset("moons", points=50, name="next")
    assert sorted(path.name for path in Path("datasets").iterdir()) == [".prepare.lock", "moons", "next"]
    assert len(FlowDataset("datasets", "moons", "all")) == 140


def test_an_error_while_writing_leaves_nothing(monkeypatch):
    def full(*arguments, **options): raise OSError(28, "No space left on device")
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="No space left"): prepare_dataset("moons", points=20)
    assert [path.name for path in Path("datasets").iterdir()] == [".prepare.lock"]


def test_two_at_once_agree():
    code = "import sys; sys.path[:0] = {!r}; from flowbook.data import prepare_dataset; print(prepare_dataset('moons', points={}).new)"
    def start(points):
        command = [sys.executable, "-c", code.format(sys.path, points)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    same = [process.communicate(timeout=120) for process in [start(50_000) for _ in range(3)]]
    assert sorted(out.strip() for out, _ in same) == ["False", "False", "True"], same
    out, error = start(60_000).communicate(timeout=120)
    assert not out and "FileExistsError" in error and "already holds 50000 points from moons" in error
    assert sorted(os.listdir("datasets")) == [".prepare.lock", "moons"]


def test_without_the_systems_locks_it_still_works(monkeypatch):
    def none(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)       # as on some network file systems
    assert prepare_dataset("moons", points=20).new and not prepare_dataset("moons", points=20).new


def test_a_data_set_that_can_only_be_read():
    prepare_dataset("moons", points=20)
    Path("datasets/.prepare.lock").unlink()
    assert not prepare_dataset("moons", points=20).new
    assert os.listdir("datasets") == ["moons"]


# Splits, sizes, statistics

@settings(deadline=None, max_examples=50)
@given(count=st.integers(10, 400), seed=st.integers(0, 2**32 - 1))
def test_splits_are_disjoint_complete_and_keyed(count, seed):
    points = torch.arange(count)[:, None]
    splits = split_points(points, seed)
    assert torch.equal(torch.cat(list(splits.values())).sort(0).values, points)
    assert len(splits["validation"]) == count // 10 and len(splits["test"]) == count // 5
    assert all(torch.equal(split, split_points(points, seed)[name]) for name, split in splits.items())


@settings(deadline=None, max_examples=10)
@given(count=st.integers(10, 200), seed=st.integers(0, 2**32 - 1), draw=st.data())
def test_sizes_nest(count, seed, draw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mine.npy")
        np.save(path, np.random.default_rng(seed).normal(size=(count, 2)))
        available = prepare_dataset(path, folder, seed=seed).counts["train"]
        small, large = sorted(draw.draw(st.tuples(*[st.integers(1, available)] * 2)))
        one, other = FlowDataset(folder, "mine", small), FlowDataset(folder, "mine", str(large))
        assert len(one) == small and torch.equal(one.tensor, other.tensor[:small])
        for split in ("validation", "test"):
            assert FlowDataset(folder, "mine", small, split).fingerprint == FlowDataset(folder, "mine", large, split).fingerprint


@settings(deadline=None)
@given(size=st.integers(1, 10**6), available=st.integers(1, 10**6))
def test_a_size_is_a_number_or_refused(size, available):
    if size <= available: assert count_of_size(size, available) == count_of_size(f"{size}", available) == size
    else:
        with pytest.raises(ValueError, match=f"there are {available:,} training points"): count_of_size(size, available)


VALUES = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0., 1., 255., 1e-30, -3e4])

@settings(deadline=None)
@given(values=st.sampled_from([(2, 1), (7, 3), (5, 2, 3, 4), (3, 1, 2, 2)]).flatmap(lambda s: arrays("float32", s, elements=VALUES)))
def test_normalising_there_and_back(values):
    points = torch.from_numpy(values)
    stats = NormalizationStats.from_data(points)
    there = stats.normalize(points)
    back = stats.denormalize(there)
    scale = points.abs().amax(0).maximum(stats.mean.abs())
    assert there.isfinite().all() and stats.data_shape == tuple(points.shape[1:])
    assert ((back - points).abs() <= 4e-7 * scale + 1e-37).all()
    still = (points.amin(0) == points.amax(0)) & (stats.std == 1) & (stats.mean == points[0])
    assert torch.equal(back[:, still], points[:, still])


def test_statistics_against_numpy():
    images = np.random.default_rng(0).normal(3, 2, size=(50, 3, 4, 4)).astype("float32")
    stats = NormalizationStats.from_data(torch.from_numpy(images))
    mean = images.mean(0, dtype="float64")                                      # of each pixel
    deviation = np.sqrt(((images - mean) ** 2).mean((0, 2, 3)))                 # of each channel, about those means
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stats.std, np.broadcast_to(deviation[:, None, None], (3, 4, 4)), rtol=1e-6)
    integers = torch.tensor([[1, 2], [5, 9]])
    assert torch.equal(NormalizationStats.from_data(integers).normalize(integers), torch.tensor([[-1., -1], [1, 1]]))
    far = NormalizationStats.from_data(torch.full((1000, 1), 16777216.).add_(torch.arange(1000)[:, None] % 2 * 2))
    assert far.std.item() == 1 and abs(far.mean.item() - 16777217) <= 1


@pytest.mark.parametrize("mean, std, words", [
    (torch.zeros(2), torch.zeros(2), "greater than 0"), (torch.zeros(2), -torch.ones(2), "greater than 0"),
    (torch.zeros(2), torch.ones(3), "must be the same"), (torch.full((2,), float("nan")), torch.ones(2), "mean has values that are NaN"),
    (torch.zeros(2), torch.full((2,), float("inf")), "std has values that are NaN or infinite"), ([0.], [1.], "no tensor of floats"),
    (torch.zeros(2, dtype=torch.long), torch.ones(2), "mean is no tensor of floats")])
def test_statistics_that_cannot_normalise_are_refused(mean, std, words):
    with pytest.raises(ValueError, match=words): NormalizationStats(mean, std)
    torch.save({"mean": mean, "std": std}, "stats.pt")
    with pytest.raises(ValueError, match=f"stats.pt holds no normalisation statistics.*{words}"): NormalizationStats.load("stats.pt")


def test_the_difference_of_statistics_is_said():
    stats = NormalizationStats(torch.zeros(8), torch.ones(8))
    assert stats.difference(NormalizationStats(torch.full((8,), 1e-8), torch.ones(8) * (1 + 1e-7))) is None
    assert stats.difference(NormalizationStats(torch.zeros(2), torch.ones(2))) == "shape (8,) against (2,)"
    words = stats.difference(NormalizationStats(torch.zeros(8), torch.tensor([1., 2., 1., 1., 4., 1., 1., 1.])))
    assert words == "std differs in 2 of 8 features (1, 4), by up to 3 (1 against 4), relatively by up to 75.00%"
    words = stats.difference(NormalizationStats(torch.ones(8), torch.ones(8) * 2))
    assert "mean differs in 8 of 8 features (0, 1, 2, 3, 4, ...)" in words and "; std differs in 8 of 8" in words


def test_from_tensor_refuses_in_words():
    for x, words in ((torch.zeros(5), "shape \\(5,\\)"), (torch.zeros(5, 2, dtype=torch.cfloat), "complex64"),
                     (torch.zeros(0, 2), "no points"),
                     (torch.tensor([[1., float("nan")]]), "1 of 2 values"),
                     (torch.tensor([[1e300]], dtype=torch.double), "first is 1e\\+300")):
        with pytest.raises(ValueError, match=words): FlowDataset.from_tensor(x)
    with pytest.raises(ValueError, match="points of shape \\(2,\\), and the statistics \\(3,\\)"):
        FlowDataset.from_tensor(torch.zeros(5, 2), NormalizationStats(torch.zeros(3), torch.ones(3)))


def test_fingerprints_tell_values_order_and_shape_apart():
    x = torch.arange(12.).view(6, 2)
    prints = [FlowDataset.from_tensor(y).fingerprint for y in (x, x + 1, x.flip(0), x.view(4, 3), x[:5])]
    assert len(set(prints)) == 5 and prints[0] == FlowDataset.from_tensor(x.clone()).fingerprint


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 100), fraction=st.floats(0.01, 0.9), seed=st.integers(0, 2**32 - 1))
def test_held_out_points_are_apart_and_in_order(count, fraction, seed):
    whole = FlowDataset.from_tensor(torch.arange(count).float()[:, None])
    if max(1, round(fraction * count)) == count: return
    left, held = whole.hold_out(fraction, seed)
    assert torch.equal(torch.cat([left.tensor, held.tensor]).sort(0).values, whole.tensor)
    assert all(torch.equal(part.tensor, part.tensor.sort(0).values) for part in (left, held))
    assert left.stats is whole.stats and len({left.fingerprint, held.fingerprint, whole.fingerprint}) == 3
    assert whole.hold_out(fraction, seed)[0].fingerprint == left.fingerprint


@pytest.mark.parametrize("fraction", [0, 1, -.5, .99, float("nan")])
def test_a_part_that_leaves_nothing_cannot_be_held_out(fraction):
    with pytest.raises(ValueError, match="fraction="): FlowDataset.from_tensor(torch.randn(10, 2)).hold_out(fraction)


# Batches and augmentation

@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), shuffle=st.booleans(), drop_last=st.booleans(),
       epoch=st.integers(1, 10**6), draw=st.data())
def test_batches_are_the_points(count, batch_size, shuffle, drop_last, epoch, draw):
    dataset = FlowDataset.from_tensor(torch.arange(count).float()[:, None], NormalizationStats(torch.zeros(1), torch.ones(1)))
    if drop_last and batch_size > count:
        with pytest.raises(ValueError, match="leaves no batch"): create_dataloader(dataset, batch_size, drop_last=True)
        return
    loader = create_dataloader(dataset, batch_size, shuffle, seed=5, drop_last=drop_last)
    loader.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = torch.cat(batches).flatten().tolist()
    assert len(set(seen)) == len(seen) == (len(loader) * batch_size if drop_last else count)
    if not shuffle: assert seen == sorted(seen)
    start = draw.draw(st.integers(0, len(loader)))
    loader.set_epoch(epoch, start)
    rest = list(loader)
    assert len(rest) == len(batches) - start and all(map(torch.equal, rest, batches[start:]))
    with pytest.raises(ValueError, match="start="): loader.set_epoch(1, len(loader) + 1)


def test_batches_can_be_changed_without_changing_the_data():
    dataset = FlowDataset.from_tensor(torch.randn(10, 2))
    before = dataset.tensor.clone()
    for shuffle in (True, False):
        for batch in create_dataloader(dataset, 4, shuffle): batch.zero_()
    assert torch.equal(dataset.tensor, before)


def test_data_stays_on_the_host_when_the_gpu_is_small(monkeypatch):
    points = torch.zeros(1000, 2)
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device) or self)
    for free, stays in ((points.nbytes * 2 - 2, True), (points.nbytes * 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        moved.clear()
        data._place(points, torch.device("cuda"))
        assert moved == ([] if stays else [torch.device("cuda")])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(32, 2), (16, 3, 4, 4)])
def test_augmentation_is_a_function_of_batch_and_generator(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before, augment, randomness = x.clone(), create_augmentation(name), Randomness(3)
    torch.manual_seed(0)
    once = augment(x, randomness.generator("augment", 9))
    torch.manual_seed(1)
    assert torch.equal(once, augment(x, randomness.generator("augment", 9))) and torch.equal(x, before)
    assert once.shape == x.shape and once.dtype == x.dtype
    assert torch.equal(once, x) == (name == "none") == torch.equal(once, augment(x, randomness.generator("augment", 10)))


@pytest.mark.parametrize("arguments, words", [
    (("mix",), "did you mean 'mixup'"), (("noise", -1.), "noise_std=-1.0"), (("mixup", .1, 0.), "mixup_alpha=0.0"),
    (("noise", float("nan")), "noise_std=nan"), (("mixup", .1, float("inf")), "mixup_alpha=inf")])
def test_augmentations_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words): create_augmentation(*arguments)


@pytest.mark.parametrize("alpha", [.01, .2, .5, 1., 2.5, 40.])
def test_beta_has_the_exact_distribution(alpha):
    drawn = symmetric_beta(100_000, alpha, torch.Generator().manual_seed(11)).double().numpy()
    grid = distributions.beta(alpha, alpha).ppf(np.linspace(.02, .98, 49))
    grid = grid[(grid > 1e-4) & (grid < 1 - 1e-4)]
    gap = abs(np.searchsorted(np.sort(drawn), grid) / len(drawn) - distributions.beta(alpha, alpha).cdf(grid))
    assert ((drawn >= 0) & (drawn <= 1)).all() and (not len(gap) or gap.max() < 1.95 / len(drawn)**.5)
    assert abs(drawn.mean() - .5) < .007 and abs(drawn.var() / (.25 / (2 * alpha + 1)) - 1) < .03


def test_noise_and_mixup_do_what_they_say():
    x = torch.zeros(200_000, 1)
    assert abs(create_augmentation("noise", .3)(x, torch.Generator().manual_seed(0)).std() - .3) < .003
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    mixed = create_augmentation("mixup", mixup_alpha=1.)(x, torch.Generator().manual_seed(1))
    assert abs(mixed.var() - 2 / 3) < .01 and abs(mixed.mean()) < .01


@pytest.mark.cuda
def test_on_a_gpu_the_order_is_that_of_the_cpu(monkeypatch):
    dataset = FlowDataset.from_tensor(torch.randn(1000, 2))
    here = list(create_dataloader(dataset, 64, True, seed=1))
    resident = create_dataloader(dataset, 64, True, seed=1, device="cuda")
    assert not resident.copies and resident.points.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 10**9))
    copied = create_dataloader(dataset, 64, True, seed=1, device="cuda")
    assert copied.copies and not copied.points.is_cuda
    for a, b, c in zip(here, resident, copied, strict=True):
        assert b.is_cuda and c.is_cuda and torch.equal(a, b.cpu()) and torch.equal(a, c.cpu())
    for name in AUGMENTATIONS:
        augment, randomness = create_augmentation(name), Randomness(3, "cuda")
        once = augment(b, randomness.generator("augment", 9))
        assert once.is_cuda and torch.equal(once, augment(b, randomness.generator("augment", 9)))


def test_statistics_that_differ_where_one_of_them_is_zero_are_told_in_finite_numbers():
    one, other = (NormalizationStats(torch.tensor([0.0, mean]), torch.ones(2)) for mean in (0.0, 0.5))
    for first, second in ((one, other), (other, one)):
        assert "by up to 0.5" in first.difference(second) and "relatively by up to 100.00%" in first.difference(second)
