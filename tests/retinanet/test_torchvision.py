"""torchvision's weights in every framework."""

import importlib.util
import json
import os
import pickle

import numpy as np
import pytest
from backends import RETINANETS
from folders import ROOT

torch = pytest.importorskip("torch")

from focal.core.anchors import AnchorConfig  # noqa: E402
from focal.retinanet import RetinaNetConfig, load_torchvision, predict  # noqa: E402
from focal.retinanet.architecture import BACKBONES, backbone_of  # noqa: E402
from focal.retinanet.detector import backend_module  # noqa: E402
from focal.retinanet.presets import CONVENTIONS  # noqa: E402
from focal.retinanet.torch.network import (  # noqa: E402
    FrozenBatchNorm2d,
    ResNet,
    build_network,
    load_state,
    state,
)
from focal.retinanet.torchvision import from_torchvision, read_torchvision  # noqa: E402
from focal.retinanet.weights import load_weights  # noqa: E402

TINY = RetinaNetConfig(
    classes=("a", "b", "c"),
    backbone="tiny",
    norm="batch",
    levels=(3, 4, 5),
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(20.0, 40.0, 80.0)),
    channels=64,
    head_depth=2,
)
SMALL = TINY.replace(channels=16, head_depth=1, levels=(3, 4, 5, 6, 7), anchors=AnchorConfig())
CANVAS = (96, 128)


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny():
    """A tiny network in evaluation mode; not to be changed."""
    return build_network(TINY, seed=0).eval()


@pytest.fixture(scope="module")
def published():
    """Networks of torchvision's two architectures, with 91 classes, as PyTorch modules."""
    networks = {}
    for version, norm in (("torchvision", "frozen_batch"), ("torchvision_v2", "batch")):
        config = RetinaNetConfig(
            classes=tuple(str(k) for k in range(91)),
            image_size=CANVAS,
            norm=norm,
            **CONVENTIONS[version],
        )
        network = build_network(config, seed=3).eval()
        for i, (name, x) in enumerate(network.state_dict().items()):
            if name.endswith("running_var"):
                x.copy_(0.5 + images(len(x), seed=i).abs())
        networks[version] = network
    return networks


@pytest.mark.parametrize("version", ["torchvision", "torchvision_v2"])
@pytest.mark.parametrize("backend", RETINANETS)
def test_a_published_state_dict_loads_into_every_backend(published, backend, version):
    network = published[version]
    source = network.state_dict()
    source = older_names(source) if version == "torchvision" else source
    model = load_torchvision(source, backend, image_size=CANVAS, norm_eps=1e-5, device="cpu")
    assert model.config == network.config
    tensors, expected = backend_module(backend).state(model), state(network)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(tensors[name], x, err_msg=name)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_is_known_by_its_weights(name):
    with torch.device("meta"):
        tensors = ResNet(BACKBONES[name], torch.nn.BatchNorm2d).state_dict()
    assert backbone_of(tensors) == name
    assert backbone_of({f"backbone.body.{k}": x for k, x in tensors.items()}) == name
    tensors.pop(next(k for k in tensors if k.startswith("layer4") and k.endswith("conv2.weight")))
    with pytest.raises(ValueError, match="expected weights of a RetinaNet or of one of tiny"):
        backbone_of(tensors)


def test_published_v1_weights_were_trained_without_epsilon(published):
    source = published["torchvision"].state_dict()
    weight = "backbone.body.bn1.weight"
    var = source["backbone.body.bn1.running_var"].numpy()
    loaded = state(load_torchvision(source, image_size=CANVAS, device="cpu"))[weight]
    np.testing.assert_allclose(loaded, np.sqrt((var + 1e-5) / var), rtol=1e-6)
    second = published["torchvision_v2"].state_dict()
    assert (state(load_torchvision(second, image_size=CANVAS, device="cpu"))[weight] == 1).all()


# What torchvision itself detects, from tests/golden/make_torchvision.py


def made_by(name):
    """A script of tests/golden, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "golden" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = made_by("make_torchvision")
CASES = {
    (case["version"], tuple(case["image_size"])): case
    for case in json.loads(SCRIPT.PATH.read_text())["cases"]
}
V1, V2 = SCRIPT.VERSIONS


@pytest.fixture(scope="module")
def seeded():
    """The script's weights of both versions."""
    tensors = {}
    for version, convention in ((V1, "torchvision"), (V2, "torchvision_v2")):
        config = RetinaNetConfig(
            classes=tuple(map(str, range(SCRIPT.CLASSES))), **CONVENTIONS[convention]
        )
        shapes = {name: x.shape for name, x in state(build_network(config, seed=0)).items()}
        tensors[version] = SCRIPT.weights(shapes)
    return tensors


@pytest.mark.parametrize(
    ("backend", "version", "size"),
    [
        *(("torch", version, size) for version in (V1, V2) for size in SCRIPT.SIZES),
        *((b, *c) for b in RETINANETS[1:] for c in ((V1, (800, 1088)), (V2, (480, 640)))),
    ],
)
def test_every_detection_of_torchvision_is_found(seeded, backend, version, size):
    """In any order: boxes within 0.01 pixels, scores within 1e-5, of 300 that overlap."""
    model = load_torchvision(seeded[version], backend, image_size=size, device="cpu")
    (found,) = predict(model, [SCRIPT.image(size)])
    wanted = {k: np.array(CASES[version, size][k]) for k in ("boxes", "scores", "labels")}
    assert len(found["scores"]) == len(wanted["scores"]) == 300
    same = np.abs(found["boxes"][:, None] - wanted["boxes"]).max(axis=-1) < 0.01
    same &= np.abs(found["scores"][:, None] - wanted["scores"]) < 1e-5
    same &= found["labels"][:, None] == wanted["labels"]
    assert same.any(axis=0).all() and same.any(axis=1).all()


def test_names_of_classes(published):
    source = published["torchvision"].state_dict()
    names = [f"thing {k}" for k in range(91)]
    assert load_torchvision(source, classes=names, device="cpu").config.classes == tuple(names)
    with pytest.raises(ValueError, match="load_torchvision: classes must be 91 names; got 2"):
        load_torchvision(source, classes=["a", "b"])


def test_what_is_no_detector_of_torchvision(tmp_path):
    with pytest.raises(ValueError, match="load_torchvision: source must be the weights of a Ret"):
        load_torchvision({"fc.weight": np.zeros((10, 4)), "conv1.weight": np.zeros((4, 3, 7, 7))})
    with pytest.raises(FileNotFoundError, match="expected a state dict of torchvision"):
        load_torchvision(tmp_path / "none.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        load_torchvision(tmp_path / "broken.safetensors")


class Program:
    """What a pickle from a stranger may hold: loading it would call `callable(*arguments)`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_no_code_in_a_file_of_weights_is_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"backbone.body.conv1.weight": Program(trap)}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"conv1.weight": Program(trap)}))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Program(trap)))
    for name in ("new.pth", "old.pth", "pickle.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}: expected a "):
            read_torchvision(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: expected a whole safetensors file"):
            load_weights(tmp_path / name)
        assert not trap.exists()
    pickle.loads((tmp_path / "old.pth").read_bytes())
    assert trap.exists()  # it is a trap


@pytest.mark.parametrize("content", [b"", b"no pickle", [1, 2], {"a": "text"}, torch.zeros(3)])
def test_a_pth_file_of_other_things(tmp_path, content):
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"model.pth: expected a state dict of torchvision; "):
        read_torchvision(path)


def older_names(tensors):
    """The names in torchvision's published v1 file, which precedes its present modules."""
    renamed = {}
    for name, x in tensors.items():
        parts = name.split(".")
        if parts[2] == "conv":  # head.classification_head.conv.1.0.weight was conv.2.weight
            parts[3:5] = [str(2 * int(parts[3]))]
        elif parts[2] in ("inner_blocks", "layer_blocks"):
            del parts[4]
        renamed[".".join(parts)] = x
    return renamed


@pytest.mark.parametrize("kind", ["mapping", "pth", "safetensors"])
@pytest.mark.parametrize("older", [False, True])
def test_torchvision_state_dicts_load(tiny, tmp_path, kind, older):
    source = dict(tiny.state_dict())
    if older:
        source = older_names(source)
        assert "head.regression_head.conv.2.weight" in source
        assert "backbone.fpn.inner_blocks.0.weight" in source
    if kind == "pth":
        torch.save(source, tmp_path / "model.pth")
        source = tmp_path / "model.pth"
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file(source, tmp_path / "model.safetensors")
        source = tmp_path / "model.safetensors"
    tensors = read_torchvision(source)
    expected = state(tiny)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(tensors[name], x)


def test_a_torchvision_classifier_is_a_backbone(tiny):
    body = build_network(TINY, seed=5).backbone.body.state_dict()
    classifier = {**body, "fc.weight": torch.ones(10, 128), "fc.bias": torch.ones(10)}
    tensors = read_torchvision(classifier)
    model = build_network(TINY, seed=6)
    load_state(model, state(model) | tensors)
    for name, x in model.backbone.body.state_dict().items():
        assert torch.equal(x, body[name]), name


def test_the_epsilon_of_a_torchvision_network_is_taken_up():
    config = SMALL.replace(norm="frozen_batch")
    model = build_network(config, seed=0)
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.running_var.copy_(1e-5 * (0.1 + images(len(norm.running_var), seed=i).abs()))
        norm.weight.mul_(1e-3)
    x = images(1, 3, 64, 64)
    loaded = build_network(config, seed=1)
    load_state(loaded, read_torchvision(model.state_dict(), norm_eps=0.0))
    # The same network with epsilon 0: variances lower by the epsilon that is added to them.
    for norm in (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.running_var.sub_(1e-5)
    for a, b in zip(model(x), loaded(x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_torchvision_names_become_ours():
    older = {
        "backbone.body.bn1.num_batches_tracked": np.int64(3),
        "backbone.body.layer1.0.conv1.weight": np.ones(1),
        "backbone.fpn.inner_blocks.2.bias": np.ones(2),
        "backbone.fpn.layer_blocks.1.0.weight": np.ones(3),
        "backbone.fpn.extra_blocks.p6.weight": np.ones(4),
        "head.classification_head.conv.6.weight": np.ones(5),
        "head.regression_head.conv.3.0.bias": np.ones(6),
        "head.regression_head.conv.3.1.bias": np.ones(7),
        "head.regression_head.bbox_reg.bias": np.ones(8),
    }
    sizes = {name: x.size for name, x in from_torchvision(older).items()}
    assert sizes == {
        "backbone.body.layer1.0.conv1.weight": 1,
        "backbone.fpn.inner_blocks.2.0.bias": 2,
        "backbone.fpn.layer_blocks.1.0.weight": 3,
        "backbone.fpn.extra_blocks.p6.weight": 4,
        "head.classification_head.conv.3.0.weight": 5,
        "head.regression_head.conv.3.0.bias": 6,
        "head.regression_head.conv.3.1.bias": 7,
        "head.regression_head.bbox_reg.bias": 8,
    }


def test_another_epsilon_goes_into_the_weight():
    source = {
        "backbone.body.bn1.weight": np.float32([2.0, 3.0]),
        "backbone.body.bn1.running_var": np.float32([1e-5, 3e-5]),
    }
    tensors = from_torchvision(source, norm_eps=0.0)
    np.testing.assert_allclose(
        tensors["backbone.body.bn1.weight"], [2 * 2**0.5, 3 * (4 / 3) ** 0.5], rtol=1e-6
    )
    assert source["backbone.body.bn1.weight"][0] == 2
    assert tensors["backbone.body.bn1.weight"].dtype == np.float32
