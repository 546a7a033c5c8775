"""The weights file: exact, whole or absent, and plain about what is wrong with it."""

import os
import re

import numpy as np
import pytest

pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.numpy import save_file

from focal.core.anchors import AnchorConfig
from focal.retinanet.config import RetinaNetConfig
from focal.retinanet.weights import check_names, load_weights, save_weights

CONFIG = RetinaNetConfig(
    classes=("disc", "étoile"),
    backbone="tiny",
    prior=0.1 + 0.2,
    allow_low_quality=0.2,
    alpha=None,
    levels=(3, 4),
    anchors=AnchorConfig(strides=(8, 16), sizes=(20.0, 40.0), scales=(1.0, 2 ** (1 / 3))),
)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "conv.bias": np.array([-0.0, np.inf, 1e-45, np.nan], np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(2.5).reshape(()),
    }


@pytest.fixture
def file(tmp_path, tensors):
    save_weights(tmp_path / "net.safetensors", tensors, CONFIG)
    return tmp_path / "net.safetensors"


def test_round_trip_is_exact(file, tensors):
    loaded, config = load_weights(file)
    assert config == CONFIG
    assert loaded.keys() == tensors.keys()
    for name, x in tensors.items():
        assert loaded[name].dtype == x.dtype and loaded[name].shape == x.shape
        assert loaded[name].tobytes() == x.tobytes()


def test_paths_may_be_strings(tmp_path, tensors):
    save_weights(str(tmp_path / "w"), tensors, CONFIG)
    assert load_weights(str(tmp_path / "w"))[1] == CONFIG


def test_memory_layout_does_not_matter(tmp_path, tensors):
    x = tensors["conv.weight"]
    views = {
        "transposed": x.T,
        "fortran": np.asfortranarray(x),
        "strided": x[::2, :, ::-1],
        "broadcast": np.broadcast_to(np.float32(3), (2, 5)),
    }
    before = dict(views)
    save_weights(tmp_path / "w", views, CONFIG)
    loaded, _ = load_weights(tmp_path / "w")
    for name, view in before.items():
        assert views[name] is view  # the caller's dict is as it was
        np.testing.assert_array_equal(loaded[name], view)


def test_it_is_a_plain_safetensors_file(file):
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    assert metadata == {"format": "focal.retinanet", "version": "1", "config": CONFIG.to_json()}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(file, tensors, monkeypatch):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_weights(file, {"other": np.ones(3)}, CONFIG)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_saving_replaces_the_file(file):
    save_weights(file, {"other": np.ones(3)}, CONFIG.replace(classes=("x",)))
    loaded, config = load_weights(file)
    assert list(loaded) == ["other"] and config.classes == ("x",)
    assert os.listdir(file.parent) == [file.name]


# What is wrong with it


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: expected a file of format"):
        load_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net\.safetensors: expected a whole safetensors file"):
        load_weights(file)


def test_a_file_of_another_kind(file):
    file.write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(ValueError, match=r"net\.safetensors: expected a whole safetensors file"):
        load_weights(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "expected format 'focal.retinanet' or 'focal.checkpoint', version '1'.* None"),
        ({"format": "pt"}, "found format 'pt', version None"),
        ({"format": "focal.retinanet", "version": "2"}, "version '2'"),
        ({"format": "focal.retinanet", "version": "1"}, "expected a RetinaNetConfig inside"),
        (
            {"format": "focal.retinanet", "version": "1", "config": "{"},
            "expected a RetinaNetConfig inside",
        ),
        (
            {
                "format": "focal.retinanet",
                "version": "1",
                "config": CONFIG.to_json().replace("gamma", "delta"),
            },
            "expected a RetinaNetConfig inside.*delta",
        ),
    ],
)
def test_foreign_metadata(tmp_path, metadata, message):
    path = tmp_path / "foreign.safetensors"
    save_file({"x": np.ones(2)}, path, metadata)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        load_weights(path)


def test_check_names_accepts_what_fits(tensors):
    check_names(tensors, {name: x.shape for name, x in tensors.items()})


def test_check_names_lists_the_first_few(tensors):
    expected = {"conv.weight": (4, 3, 1, 1), "conv.bias": (4,), **{f"m{i}": (1,) for i in range(5)}}
    with pytest.raises(ValueError) as error:
        check_names(tensors, expected)
    assert str(error.value) == (
        "the weights are not those of this network: 5 missing (m0, m1, m2, ...); "
        "2 unexpected (empty, scalar); "
        "1 of another shape (conv.weight (4, 3, 3, 3) for (4, 3, 1, 1))"
    )
