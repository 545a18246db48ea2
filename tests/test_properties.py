"""What holds for every configuration: it comes back equal from a dictionary and from a file, and anything else is refused in words."""

import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbook.config import LIMITS, Compile, Precision, Schedule, TrainingConfig

MOST = 2**53                                            # JSON's other readers know whole numbers up to here
finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)     # no file's name has a NUL
name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)

BY_TYPE = {str: text, str | None: st.none() | text, bool: st.booleans(), dict: st.dictionaries(text, json_values, max_size=3),
           tuple[str, ...]: st.lists(text, max_size=3).map(tuple)}
BY_NAME = dict(
    arch=name, flow=name, dataset=name, source=name, aug=name, seed=st.integers(0, 2**32 - 1),
    steps_per_epoch=st.integers(0, MOST), schedule=st.sampled_from(Schedule.__args__), precision=st.sampled_from(Precision.__args__),
    compile=st.sampled_from(Compile.__args__),
    noise_std=st.floats(0, 1e300), mixup_alpha=st.floats(0, 1e300, exclude_min=True), lr=st.floats(0, 1e300, exclude_min=True),
    weight_decay=st.floats(0, 1e300), ema_decay=st.floats(0, 1, exclude_max=True), grad_clip=st.floats(0, 1e300),
    min_delta=st.floats(0, 1e300), epochs=st.integers(1, MOST), batch_size=st.integers(1, MOST), warmup_steps=st.integers(0, MOST),
    patience=st.integers(0, MOST), log_every=st.integers(1, MOST), max_skipped_steps=st.integers(0, MOST),
    device=st.sampled_from(["auto", "cpu", "mps", "cuda"]) | st.integers(0, 99).map("cuda:{}".format))

FIELDS = {field.name: field.type for field in fields(TrainingConfig)}
valid = st.fixed_dictionaries({}, optional={field: BY_NAME[field] if field in LIMITS else BY_TYPE[kind] for field, kind in FIELDS.items()})


def test_every_field_is_tried():
    assert LIMITS.keys() <= FIELDS.keys()
    assert BY_NAME.keys() == LIMITS.keys(), "a new limit needs a strategy above"


@settings(deadline=None, max_examples=300)
@given(values=valid)
def test_every_valid_configuration_comes_back_equal(values):
    config = TrainingConfig(**values)
    assert TrainingConfig.from_dict(config.to_dict()) == config
    for field in values.keys() - {"dataset", "stats_path"}:         # these two may be completed
        assert getattr(config, field) == values[field]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        config.save(path)
        assert TrainingConfig.load(path) == config


@settings(deadline=None, max_examples=200)
@given(values=valid, changes=valid)
def test_a_replaced_field_is_the_only_one_that_differs(values, changes):
    config = TrainingConfig(**values)
    assert config.replace(**config.to_dict()) == config
    different = config.replace(**changes).differences(config)
    assert different.keys() <= changes.keys() | {"dataset", "stats_path"}


def gives_a_configuration_or_says_what_is_wrong(make, given):
    try:
        config = make(given)
    except (TypeError, ValueError) as error:
        assert 0 < len(str(error)) < 10_000
    else:
        assert TrainingConfig.from_dict(config.to_dict()) == config


@settings(deadline=None, max_examples=500)
@given(values=st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=8), json_values | name, max_size=6))
def test_any_dictionary_gives_a_configuration_or_an_error_in_words(values):
    gives_a_configuration_or_says_what_is_wrong(TrainingConfig.from_dict, values)


@settings(deadline=None, max_examples=200)
@given(ending=st.sampled_from([".json", ".toml"]), content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_gives_a_configuration_or_an_error_in_words(ending, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"config{ending}")
        path.write_bytes(content)
        gives_a_configuration_or_says_what_is_wrong(TrainingConfig.load, path)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("values", [
    pytest.param({"arch_options": {"x": nested(100_000)}}, id="options deeper than Python goes"),
    pytest.param({"data_dir": "x" * 5000}, id="a folder longer than a path may be"),
    pytest.param({"data_dir": "a\0b"}, id="a folder with a NUL"),
    pytest.param({"dataset": "1k", "data_dir": "\ud800"}, id="a folder that no file system can spell"),
    pytest.param({"lr": 10**400, "epochs": 10**400}, id="a number that no float holds"),
    pytest.param({"seed": True, "group": ""}, id="a switch for a number"),
    pytest.param({"arch": "../../x", "dataset": "../x"}, id="names that climb"),
])
def test_a_hostile_dictionary_is_refused_in_words_or_harmless(values):
    gives_a_configuration_or_says_what_is_wrong(TrainingConfig.from_dict, values)


@pytest.mark.parametrize("ending", [".json", ".toml"])
@pytest.mark.parametrize("content", [pytest.param(b"[" * 100_000, id="lists"), pytest.param(b'{"a":' * 100_000, id="tables"),
                                     pytest.param(b"a=" + b"[" * 100_000, id="a list"), pytest.param(b"9" * 9999, id="a number")])
def test_a_file_deeper_than_python_goes_is_refused_in_words(tmp_path, ending, content):
    path = tmp_path / f"config{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config{ending}"):
        TrainingConfig.load(path)
