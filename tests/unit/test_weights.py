"""Weight files: every container gives the same tensors, nothing in them runs, and what does not fit is listed."""

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from medseg_jax.models.unet import UNet
from medseg_jax.types import UserError
from medseg_jax.weights import KeyMap, Rule, key_map, load, read_weights, without_prefix
from medseg_jax.weights.torch_file import read_torch

FILES = Path(__file__).parent / "files"
"""torch_zip.pth and torch_stream.pth, which PyTorch 2.13 wrote in two formats: {"model": an OrderedDict with a view,
a transpose, a bfloat16 Parameter and a scalar, "model_ema", "args": argparse.Namespace, "optimizer", "epoch"}."""

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize("container", ["zip", "stream"])
def test_a_pytorch_file_gives_its_tensors(container):
    said = []
    found = read_weights(FILES / f"torch_{container}.pth", said.append)
    assert said == [f"torch_{container}.pth: model read; torch_{container}.pth#model_ema reads another set"]
    assert list(found) == ["a.weight", "a.view", "a.t", "b", "n"]
    np.testing.assert_array_equal(found["a.weight"], BASE)
    np.testing.assert_array_equal(found["a.view"], BASE[1:3, ::2])
    np.testing.assert_array_equal(found["a.t"], BASE.T)
    assert found["b"].dtype == ml_dtypes.bfloat16
    assert found["b"].astype(float).tolist() == [1.5, -2]
    assert found["n"] == 7
    ema = read_weights(f"{FILES}/torch_{container}.pth#model_ema")
    np.testing.assert_array_equal(ema["a.weight"], BASE + 1)
    assert read_torch(FILES / f"torch_{container}.pth")["epoch"] == 3
    with pytest.raises(UserError, match=r"optimizer\.state\.0"):
        read_weights(f"{FILES}/torch_{container}.pth#teacher")


def test_safetensors_and_npz(tmp_path):
    save_file({"w": BASE}, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", w=BASE)
    for name in ("w.safetensors", "w.npz"):
        np.testing.assert_array_equal(read_weights(tmp_path / name)["w"], BASE)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)
    with pytest.raises(UserError, match="no such weight file"):
        read_weights(tmp_path / "missing.pth")


class Trap:
    """Touches a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_file_runs(tmp_path):
    victim = tmp_path / "victim"
    data = pickle.dumps({"model": Trap(victim), "w": Trap(victim)}, protocol=2)
    with zipfile.ZipFile(tmp_path / "trap.pth", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    with pytest.raises(UserError, match="no tensors"):
        read_weights(tmp_path / "trap.pth")
    assert not victim.exists()
    pickle.loads(data)
    assert victim.exists(), "the trap is none"


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    with zipfile.ZipFile(FILES / "torch_zip.pth") as source, zipfile.ZipFile(tmp_path / "cut.pth", "w") as target:
        for name in source.namelist():
            raw = source.read(name)
            target.writestr(name, raw[:8] if name.endswith("data/0") else raw)
    with pytest.raises(UserError, match="beyond its storage"):
        read_weights(tmp_path / "cut.pth")


@given(st.sampled_from(["zip", "stream"]), st.integers(0, 3000), st.integers(0, 255), st.integers(0, 3000))
def test_damaged_files_give_user_errors_only(tmp_path_factory, container, position, value, end):
    raw = bytearray((FILES / f"torch_{container}.pth").read_bytes())
    raw[position % len(raw)] = value
    path = tmp_path_factory.mktemp("damaged") / "w.pth"
    path.write_bytes(raw[: max(end, 1)])
    with contextlib.suppress(UserError):
        read_weights(path)


# ---------------------------------------------------------------- naming

MAP = KeyMap(
    "a net of two layers",
    rules=(
        Rule(r"conv\.weight", ("first/kernel", "second/kernel"), "conv"),
        Rule(r"up\.weight", "up/kernel", "conv_transpose"),
        Rule(r"head\.(weight|bias)", r"head/\1"),
    ),
    ignore=(r".*num_batches_tracked",),
    may_stay=(r"head/.*",),
    adapt=lambda tensors: without_prefix(tensors, "module.", "module.net."),
)


def ours(classes=3):
    shapes = {"first": {"kernel": (3, 3, 2, 5)}, "second": {"kernel": (3, 3, 2, 5)}, "up": {"kernel": (2, 2, 5, 4)}}
    heads = {"head": {"weight": (classes, 4), "bias": (classes,)}}
    return {a: {b: np.zeros(shape, np.float32) for b, shape in v.items()} for a, v in (shapes | heads).items()}


def theirs():
    shapes = {"conv.weight": (5, 2, 3, 3), "up.weight": (5, 4, 2, 2), "head.weight": (3, 4), "head.bias": (3,)}
    values = {f"module.net.{k}": np.random.default_rng(0).normal(size=s) for k, s in shapes.items()}
    return values | {"module.net.num_batches_tracked": np.array(1)}


def test_tensors_go_where_the_rules_say():
    loaded = load(MAP, ours(), {}, theirs())
    conv, up = theirs()["module.net.conv.weight"], theirs()["module.net.up.weight"]
    for layer in ("first", "second"):
        np.testing.assert_allclose(loaded.params[layer]["kernel"][2, 0, 1, 3], conv[3, 1, 2, 0], rtol=1e-6)
    np.testing.assert_allclose(loaded.params["up"]["kernel"][1, 0, 4, 3], up[4, 3, 1, 0], rtol=1e-6)
    assert loaded.params["up"]["kernel"].dtype == np.float32
    assert loaded.unused == ("num_batches_tracked",)
    assert loaded.stayed == ()


def test_a_head_of_other_classes_stays_and_is_named():
    assert load(MAP, ours(classes=2), {}, theirs()).stayed == ("head/weight", "head/bias")


def test_everything_that_does_not_fit_is_listed_at_once():
    tensors = theirs() | {"module.net.extra": BASE, "module.net.conv.weight": np.zeros((5, 2, 1, 1))}
    del tensors["module.net.up.weight"]
    with pytest.raises(UserError) as error:
        load(MAP, ours(), {}, tensors, "w.pth")
    for text in (
        "extra (4, 6): not known",
        "(1, 1, 2, 5) does not fit first/kernel (3, 3, 2, 5)",
        "up/kernel",
        "w.pth",
    ):
        assert text in str(error.value)


def test_a_network_without_published_weights_says_so():
    with pytest.raises(UserError, match="No published weights are known for UNet"):
        key_map(UNet())


def test_the_stream_of_an_ordinary_pickle_is_refused(tmp_path):
    stream = io.BytesIO()
    pickle.dump({"w": 1}, stream)
    (tmp_path / "w.pth").write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="magic number"):
        read_weights(tmp_path / "w.pth")
