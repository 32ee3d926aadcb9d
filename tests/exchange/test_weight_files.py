"""Weight files of all types, in one or several files, are read one tensor at a time and never executed."""

import collections
import io
import json
import pickle
import tracemalloc
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from dualsm.exchange.parameter_sources import Source, load_params
from dualsm.exchange.weight_files import open_weights, write_safetensors
from dualsm.process.errors import UserError
from tests.exchange.conftest import read_all

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(4, 3),
    "b": np.array([1.5, -0.25], np.float32),
    "scalar": np.array(3.0, np.float32),
}
TORCH_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


class Named:
    """Is pickled as a global name, like a class of a package that is not imported here."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self):
        return self.name


class Storage:
    """A storage in an archive of `torch.save`."""

    def __init__(self, key: str, kind: str, size: int):
        self.id = ("storage", Named(kind), key, "cpu", size)


class TorchPickler(pickle._Pickler):
    """Writes the format of torch's pickler, without torch."""

    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None

    def save_global(self, value, name=None):  # would write names of this module, which torch never does
        raise AssertionError(f"{value} has no name in torch; wrap it in Named")

    def save(self, value, *args, **kwargs):
        if isinstance(value, Named):
            module, _, name = value.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, *args, **kwargs)


class Call:
    """Is pickled as a call of a function by its name."""

    def __init__(self, function: str, *arguments):
        self.function, self.arguments = Named(function), arguments


def tensor(storage: Storage, offset: int, shape: tuple, strides: tuple) -> Call:
    return Call("torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, {})


def write_archive(path, content, storages: dict[str, bytes], byteorder: bytes = b"little") -> None:
    """Writes a file in the format of `torch.save`."""
    file = io.BytesIO()
    TorchPickler(file, 2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", file.getvalue())
        archive.writestr("x/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"x/data/{key}", data)


def write_torch(path, tensors: dict, dtype: str = "float32", wrap=lambda state: state) -> None:
    """Writes a state dict as `torch.save` does."""
    state, storages = {}, {}
    for key, (name, array) in enumerate(tensors.items()):
        array = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        strides = tuple(stride // array.itemsize for stride in array.strides)
        storage = Storage(str(key), f"torch.{TORCH_STORAGES[dtype]}", array.size)
        state[name] = tensor(storage, 0, array.shape, strides)
        storages[str(key)] = array.tobytes()
    write_archive(path, wrap(state), storages)


def write_shards(folder, tensors: dict[str, np.ndarray]) -> dict:
    """Writes one shard per tensor and the index; returns the index."""
    weight_map = {}
    for i, (name, array) in enumerate(tensors.items()):
        weight_map[name] = f"model-{i + 1:05}-of-{len(tensors):05}.safetensors"
        write_safetensors(folder / weight_map[name], {name: array}, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


TORCH_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *(("safetensors", dtype) for dtype in ("F32", "F16", "BF16", "F64")),
        *(("torch", dtype) for dtype in TORCH_TYPES),
        ("shards", "F32"),
    ],
)
def test_all_layouts_and_types_have_the_same_tensors(tmp_path, layout, dtype):
    if layout == "safetensors":
        write_safetensors(tmp_path / "model.safetensors", TENSORS, {}, dtype)
    elif layout == "torch":
        write_torch(tmp_path / "state_dict.bin", TENSORS, TORCH_TYPES[dtype])
    else:
        write_shards(tmp_path, TENSORS)
    weights = open_weights(tmp_path)
    assert {name: info.shape for name, info in weights.tensors.items()} == {
        name: array.shape for name, array in TENSORS.items()
    }
    for name, array in read_all(tmp_path).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, TENSORS[name])
    np.testing.assert_array_equal(weights.read("a", 1, 3), TENSORS["a"][1:3])


def test_views_of_a_storage_are_read_with_their_shape(tmp_path):
    """Also transposed views, whose strides are in the state dict."""
    data = np.arange(12, dtype=np.float32)
    storage = Storage("0", "torch.FloatStorage", 12)
    views = {
        "part": tensor(storage, 4, (2, 2), (2, 1)),
        "transposed": tensor(storage, 0, (3, 4), (1, 3)),
        "rest": tensor(storage, 8, (4,), (1,)),
    }
    write_archive(tmp_path / "a.bin", views, {"0": data.tobytes()})
    weights = open_weights(tmp_path / "a.bin")
    np.testing.assert_array_equal(weights.read("part"), data[4:8].reshape(2, 2))
    np.testing.assert_array_equal(weights.read("transposed"), data.reshape(4, 3).T)
    np.testing.assert_array_equal(weights.read("transposed", 1, 3), data.reshape(4, 3).T[1:3])
    np.testing.assert_array_equal(weights.read("rest"), data[8:])


def test_model_of_a_training_checkpoint_is_read(tmp_path):
    write_torch(tmp_path / "a.bin", TENSORS, wrap=lambda state: {"model": state, "step": 3, "optimizer": {}})
    weights = open_weights(tmp_path / "a.bin")
    assert weights.tensors.keys() == TENSORS.keys()
    assert weights.ignored == ("step", "optimizer")


def bad_archive(case: str, path) -> None:
    storage, data = Storage("0", "torch.FloatStorage", 4), np.arange(4, dtype=np.float32).tobytes()
    content = {"a": tensor(storage, 0, (4,), (1,))}
    if case == "code":
        content["b"] = Call("os.system", f"touch {path}.mark")
    elif case == "code of torch":
        content["b"] = Call("torch.load", f"{path}")
    elif case == "attribute of an allowed name":
        content["b"] = Call("collections.OrderedDict.fromkeys", "ab")
    elif case == "outside":
        content["a"] = tensor(storage, 2, (4,), (1,))
    elif case == "negative":
        content["a"] = tensor(storage, 2, (2,), (-4,))
    elif case == "huge":
        content["a"] = tensor(storage, 0, (1 << 40,), (0,))
    elif case == "no entry":
        content["a"] = tensor(Storage("1", "torch.FloatStorage", 4), 0, (4,), (1,))
    elif case == "no tensors":
        content = {"step": 3}
    elif case == "a list":
        content = [content["a"]]
    elif case == "short entry":
        data = data[:8]
    write_archive(path, content, {"0": data}, b"big" if case == "byte order" else b"little")
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-40])


BAD = ["code", "code of torch", "attribute of an allowed name", "outside", "negative", "huge", "no entry",
       "no tensors", "a list", "short entry", "byte order", "truncated"]  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_archives_with_code_or_invalid_tensors_are_rejected(tmp_path, case):
    bad_archive(case, tmp_path / "a.bin")
    with pytest.raises(UserError, match="weights-only reader rejects") as error:
        open_weights(tmp_path / "a.bin")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "a.bin.mark").exists()


def test_changed_bytes_of_an_archive_are_detected(tmp_path):
    write_torch(tmp_path / "a.bin", {"a": np.full((8,), 1.2345, np.float32)})
    content = (tmp_path / "a.bin").read_bytes()
    value = np.full(8, 1.2345, np.float32).tobytes()
    assert value in content
    (tmp_path / "a.bin").write_bytes(content.replace(value, bytes(32)))
    with pytest.raises(UserError, match="is damaged"):
        open_weights(tmp_path / "a.bin").read("a")


def damage_shards(case: str, folder, index: dict) -> None:
    weight_map = index["weight_map"]
    if case == "missing shard":
        (folder / weight_map["b"]).unlink()
    elif case == "outside":
        weight_map["b"] = "../outside.safetensors"
    elif case == "absolute":
        weight_map["b"] = str(folder / weight_map["b"])
    elif case == "not in its shard":
        weight_map["c"] = weight_map["b"]
    elif case == "not in the index":
        write_safetensors(folder / weight_map["b"], {"b": TENSORS["b"], "c": TENSORS["b"]}, {})
    elif case == "no map":
        del index["weight_map"]
    elif case == "a number":
        weight_map["b"] = 3
    elif case == "truncated":
        content = (folder / weight_map["a"]).read_bytes()
        (folder / weight_map["a"]).write_bytes(content[:-4])
    (folder / "model.safetensors.index.json").write_text("{" if case == "not JSON" else json.dumps(index))


SHARDS = {
    "missing shard": "shard model-00002-of-00003.safetensors is missing",
    "outside": "not a file in its folder",
    "absolute": "not a file in its folder",
    "not in its shard": "lacks c",
    "not in the index": "unlike the index says, c",
    "no map": "no weight_map",
    "a number": "not a file in its folder",
    "truncated": "is damaged",
    "not JSON": "not valid JSON",
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_do_not_match_their_index_are_rejected(tmp_path, case):
    damage_shards(case, tmp_path, write_shards(tmp_path, TENSORS))
    with pytest.raises(UserError, match=SHARDS[case]) as error:
        open_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_folder_without_weights_is_rejected(tmp_path):
    with pytest.raises(UserError, match="contains none of model.safetensors"):
        open_weights(tmp_path)


def test_unsupported_types_are_rejected_by_name(tmp_path):
    write_safetensors(tmp_path / "a", {"embedding": np.zeros((4, 4))}, {}, "I8")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"embedding": {"embedding": jax.ShapeDtypeStruct((4, 4), np.float32, sharding=device)}}
    sources = {"embedding/embedding": Source("embedding")}
    with pytest.raises(UserError, match="embedding has the type I8"):
        load_params(open_weights(tmp_path / "a"), sources, shapes, np.arange(4))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_peak_memory_is_close_to_that_of_the_parameters(tmp_path, dtype):
    """JAX uses some arrays without copying them; its copies of the others are not traced here."""
    layers, size, vocab_size = 16, 64, 512
    rng = np.random.default_rng(0)
    names = ["query", "key", "value", "output"]
    tensors = {
        f"{i}.{name}": rng.standard_normal((size, size), np.float32) for i in range(layers) for name in names
    }
    tensors["embedding"] = rng.standard_normal((vocab_size, size), np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors, {}, dtype)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=device)

    shapes = {name: {"kernel": leaf(layers, size, size)} for name in names}
    shapes["embedding"] = {"embedding": leaf(vocab_size, size)}
    sources = {f"{name}/kernel": [Source(f"{i}.{name}") for i in range(layers)] for name in names}
    sources["embedding/embedding"] = Source("embedding")
    weights = open_weights(tmp_path)
    jax.block_until_ready(jax.device_put(np.zeros(3)))
    tracemalloc.start()
    params = load_params(weights, sources, shapes, np.arange(vocab_size))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak < total + 1.5 * largest < 1.5 * total
    stored = ml_dtypes.bfloat16 if dtype == "BF16" else np.float32
    for name in names:
        for i in range(layers):
            expected = tensors[f"{i}.{name}"].astype(stored).astype(np.float32).T
            np.testing.assert_array_equal(params[name]["kernel"][i], expected)


@pytest.mark.extras
def test_files_of_torch_are_read_as_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra test-hf)")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = model.state_dict()
    state["half"], state["brain"] = torch.randn(5, 4).half().T, torch.randn(7).bfloat16()
    state["steps"], state["flag"] = torch.arange(6)[2:4], torch.tensor(True)
    state["parameter"] = model[0].weight
    torch.save(state, tmp_path / "a.bin")
    torch.save(collections.OrderedDict(model=state, global_step=3), tmp_path / "b.bin")
    for name in ("a.bin", "b.bin"):
        found = read_all(tmp_path / name)
        assert found.keys() == state.keys()
        for key, value in state.items():
            np.testing.assert_array_equal(found[key], value.detach().float().numpy())
            assert found[key].shape == tuple(value.shape)
