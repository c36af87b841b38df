"""Files of other programs: every layout in which people keep models is read as its own library reads it, or named."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from shodh_moe.base.errors import UserError
from shodh_moe.merging import merge
from shodh_moe.merging.inputs import open_input
from shodh_moe.merging.reading import InputReader
from shodh_moe.merging.recipe import BLOCK
from shodh_moe.merging.safetensors_file import TYPES
from tests.merging.models import State, config, load, merged, network, same_bits, save


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: str | Path, slice_length: int = 7) -> State:
    """Read every tensor of an input in slices of a few elements."""
    model = open_input(str(path))
    reader = InputReader(model, list(model.tensors))
    found = {}
    for name, stored in model.tensors.items():
        out = torch.empty(stored.nbytes, dtype=torch.uint8)
        buffer = memoryview(out.numpy())
        item = stored.dtype.itemsize
        for start in range(0, stored.numel, slice_length):
            reader.read(name, start, buffer[start * item : (start + slice_length) * item])
        found[name] = out.view(stored.dtype).view(stored.shape)
    reader.close()
    return found


def copied(model: str | Path) -> State:
    """Merge one model with weight 1."""
    return merged(Path(), "linear", [str(model)], parameters={"weight": 1}, output=f"out{len(os.listdir())}")


def manifest_notes(output: str) -> str:
    return " ".join(json.loads(Path(output, "merge.json").read_text())["notes"])


# --- pickles ---


def test_a_state_dict_with_functions_of_other_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """neuraloperator 2.0 puts the arguments of the model's class beside the weights, functions and classes too."""
    state = network()
    arguments = {"n_modes": (8, 8), "non_linearity": nn.functional.gelu, "conv_module": nn.Conv2d, "args": ()}
    torch.save(OrderedDict(**state, _metadata=arguments), "low.pt")
    torch.save(OrderedDict(**network(1, near=state), _metadata=arguments), "high.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load("low.pt")
    assert same_bits(read("low.pt"), state)
    made = merged(Path(), "ccm", ["low.pt", "high.pt"], parameters={"alpha": -1})
    assert same_bits(made, state)
    assert "low.pt: '_metadata' is not a tensor, and not used" in capsys.readouterr().out
    assert "low.pt: '_metadata' is not a tensor" in manifest_notes("out")


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


class Stateful:
    def __setstate__(self, state: Any) -> None:
        os.mkdir("executed")

    def __getstate__(self) -> Any:
        return {"a": 1}


@pytest.mark.parametrize(
    "evil",
    [
        Evil(os.mkdir, ("executed",)),
        Evil(eval, ("__import__('os').mkdir('executed')",)),
        Evil(torch.load, ("other.pt",)),
        Evil(getattr, (Evil(__import__, ("os",)), "mkdir")),
        Stateful(),
    ],
)
def test_nothing_in_a_pickle_is_run(evil: Any) -> None:
    Path("other.pt").write_bytes(pickle.dumps(Evil(os.mkdir, ("executed",))))
    torch.save({"w": torch.arange(3.0), "_metadata": {"x": evil, "y": [evil]}}, "x.pt")
    assert torch.equal(read("x.pt")["w"], torch.arange(3.0))
    torch.save({"w": torch.arange(3.0), "more": evil}, "x.pt")
    with pytest.raises(UserError, match=r"x.pt is not a plain state dict: 'more' is .*save it again"):
        open_input("x.pt")
    torch.save(evil, "x.pt")
    with pytest.raises(UserError, match=r"x.pt contains .*state_dict"):
        open_input("x.pt")
    assert not Path("executed").exists()


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write a zip file again, with each record changed."""
    with zipfile.ZipFile(path) as archive:
        records = [(one.filename, archive.read(one)) for one in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, change(name, data))


def test_mutated_pickles_give_no_other_values_and_no_other_errors() -> None:
    """What torch accepts and we accept has the same values; anything else is refused in one line."""
    state: State = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(6).view(2, 3).T, "c": torch.ones(2).half()}
    torch.save({**state, "_metadata": {"n": 3, "f": nn.functional.gelu}}, "x.pt")
    chance = random.Random(5)
    whole = Path("x.pt").read_bytes()
    refused = 0
    for _ in range(400):
        Path("y.pt").write_bytes(whole)

        def change(name: str, data: bytes) -> bytes:
            if not name.endswith("data.pkl"):
                return data
            content = bytearray(data)
            for _ in range(chance.choice((1, 1, 2, 8))):
                content[chance.randrange(len(content))] = chance.randrange(256)
            return bytes(content)

        rewrite(Path("y.pt"), change)
        try:
            ours = read("y.pt")
        except UserError:
            refused += 1
            continue
        try:
            with torch.serialization.safe_globals([nn.functional.gelu]):
                theirs = torch.load("y.pt")
        except Exception:
            continue
        assert same_bits(ours, {name: value for name, value in theirs.items() if isinstance(value, torch.Tensor)})
    assert 100 < refused < 400


def test_views_and_parameters_are_read_as_torch_reads_them() -> None:
    noise = torch.randn(6, 5, 4, 3)
    state = {
        "channels_last": noise.to(memory_format=torch.channels_last),
        "transposed": torch.randn(9, 11).T,
        "part": torch.randn(10, 10)[2:5, 3:9],
        "every second": torch.arange(40.0)[1::2],
        "expanded": torch.randn(3, 1).expand(3, 8),
        "permuted": torch.randn(2, 3, 4, dtype=torch.complex64).permute(2, 0, 1),
        "tied": noise,
        "tied too": noise[1],
        "parameter": nn.Parameter(torch.randn(3, 3)),
        "unsigned": torch.arange(7).to(torch.uint16),
        "scalar": torch.tensor(4.0),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(5, 5, dtype=torch.complex128).T,
        "none": torch.randn(4, 0, 2).transpose(0, 2),
    }
    parameter = nn.Parameter(torch.randn(4))
    parameter.origin = "here"  # type: ignore[attr-defined]
    state["with attribute"] = parameter
    torch.save(state, "x.pt")
    expected = {name: tensor.detach().contiguous() for name, tensor in torch.load("x.pt").items()}
    for slice_length in (1, 7, 10**6):
        assert same_bits(read("x.pt", slice_length), expected)
    made = copied("x.pt")
    for name, tensor in expected.items():
        assert torch.equal(made[name], torch.view_as_real(tensor) if tensor.dtype == torch.complex128 else tensor), name
    torch.save({"w": torch.randn(3, dtype=torch.complex64).conj()}, "x.pt")
    with pytest.raises(UserError, match="resolve_conj"):
        open_input("x.pt")


def test_weights_in_training_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    state = network()
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    foreign = Evil(os.mkdir, ("executed",))
    contents = {
        "lightning.ckpt": {
            "epoch": 3,
            "state_dict": state,
            "optimizer_states": [moments],
            "callbacks": {"progress": foreign},
        },
        "imagenet.pth.tar": {"state_dict": state, "best_acc1": torch.tensor(0.7), "optimizer": moments, "arch": "fno"},
        "tutorial.pt": {"model_state_dict": state, "optimizer_state_dict": moments, "loss": torch.tensor(0.1)},
        "averaged.pth": {"model": state, "model_ema": network(3), "scheduler": {"last": 3}},
        "own.pt": {"fno2d": state, "step": 3},
    }
    for name, content in contents.items():
        torch.save(content, name)
        assert same_bits(read(name), state), name
    assert not Path("executed").exists()
    merge(config(Path(), "linear", ["averaged.pth"], parameters={"weight": 1}), Path("out"))
    assert (
        "averaged.pth: the weights are those under 'model'; not used: model_ema, scheduler" in capsys.readouterr().out
    )
    for content, message in [
        ({"generator": state, "discriminator": state}, "tensors under 'generator', 'discriminator'"),
        ({"model": state, "state_dict": state}, "tensors under 'model', 'state_dict'"),
        ({"model": {**state, "f": len}, "step": 3}, "'model': 'f' is len, not a dense tensor"),
        ({"w": torch.ones(2), "step": 3}, "'step' is int, not a dense tensor"),
        ({"w": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
        (nn.Linear(2, 2), "an object of torch.nn.modules.linear.Linear, whose code is not in the file"),
    ]:
        torch.save(content, "x.pt")
        with pytest.raises(UserError, match=message):
            open_input("x.pt")


def test_files_that_are_no_models_are_named() -> None:
    torch.jit.script(nn.Linear(2, 2)).save("script.pt")
    torch.save({"w": torch.ones(2)}, "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile("arrays.pt", "w") as archive:
        archive.writestr("w.npy", b"x")
    torch.save({"w": torch.ones(200)}, "cut.pt")
    Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:-500])
    torch.save({"w": torch.ones(2)}, "zipped.pt")
    with zipfile.ZipFile("zipped.pt") as archive, zipfile.ZipFile("deflated.pt", "w", zipfile.ZIP_DEFLATED) as deflated:
        for one in archive.infolist():
            deflated.writestr(one.filename, archive.read(one))
    save_file({}, "none.safetensors")
    Path("index.json").write_text('{"weight_map": {}}')
    Path("index.json").rename("none.safetensors.index.json")
    Path("pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("page.pt").write_text("<!DOCTYPE html><html>404</html>")
    Path("plain.pt").write_bytes(pickle.dumps({"w": 1}))
    for name, message in [
        ("script.pt", "TorchScript"),
        ("old.pt", "torch before 1.6.*weights_only=True"),
        ("arrays.pt", "not one of torch.save"),
        ("cut.pt", "damaged"),
        ("deflated.pt", "compressed again"),
        ("pointer.safetensors", "git lfs pull"),
        ("page.pt", "web page"),
        ("none.safetensors", "no tensors"),
        ("none.safetensors.index.json", "no tensors"),
        ("plain.pt", "a pickle, but not one of torch.save"),
    ]:
        with pytest.raises(UserError, match=f"{name} .*{message}"):
            open_input(name)
    # The remedy of the old format works.
    torch.save(torch.load("old.pt", weights_only=True), "new.pt")
    assert torch.equal(read("new.pt")["w"], torch.ones(2))


# --- safetensors ---


def test_safetensors_headers_are_read_as_the_library_reads_them() -> None:
    """Random valid and invalid headers: the library decides which is which."""
    chance = random.Random(3)
    accepted = refused = 0
    for _ in range(1500):
        header, data = random_header(chance)
        text = json.dumps(header).encode()
        text += b" " * chance.choice((0, 0, 3, 8))
        Path("x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        try:
            theirs = load_file("x.safetensors")
        except (SafetensorError, KeyError, ValueError, RuntimeError):
            with pytest.raises(UserError):
                open_input("x.safetensors")
            refused += 1
            continue
        assert same_bits(read("x.safetensors"), theirs)
        accepted += 1
    assert accepted > 300
    assert refused > 300


def random_header(chance: random.Random) -> tuple[dict[str, Any], bytes]:
    """Return a header, possibly with one thing wrong, and the bytes that follow it."""
    header: dict[str, Any] = {}
    end = 0
    for number in range(chance.randrange(1, 5)):
        code = chance.choice(["F32", "F16", "I64", "U8", "BOOL"])
        shape = [chance.choice((0, 1, 2, 3)) for _ in range(chance.randrange(3))]
        size = TYPES[code].itemsize
        for length in shape:
            size *= length
        name = chance.choice("abxyz") + str(number)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    names = list(header)
    chance.shuffle(names)
    header = {name: header[name] for name in names}
    if chance.random() < 0.5:
        texts = [None, {}, {"format": "pt"}, {"complex128": "yes"}, {"complex128": "{"}, {"complex128": "3"}]
        header["__metadata__"] = chance.choice([*texts, {"a": 1}, {"a": None}, [], "text", 3, {"a": {"b": "c"}}])
    data = bytes(chance.randrange(2) for _ in range(end))
    entry = header[chance.choice(names)]
    wrong: list[Callable[[], object]] = [
        lambda: entry.update(dtype="F33"),
        lambda: entry.update(shape=[*entry["shape"], 2.0]),
        lambda: entry.update(shape=[*entry["shape"], 1]),
        lambda: entry.update(shape=[*entry["shape"], True]),
        lambda: entry.update(shape=[-length for length in entry["shape"]]),
        lambda: entry.update(data_offsets=[entry["data_offsets"][0], end]),
        lambda: entry.update(data_offsets=[0, entry["data_offsets"][1]]),
        lambda: entry.update(data_offsets=entry["data_offsets"][:1]),
        lambda: entry.update(more=1),
        lambda: entry.pop("shape"),
        lambda: header.update(c=None),
    ]
    if chance.random() < 0.5:
        chance.choice(wrong)()
    return header, data


# --- several files, folders and names ---


def sharded(folder: Path, state: State, index: str, ending: str) -> None:
    folder.mkdir()
    names = list(state)
    groups = {f"part-{k}{ending}": {name: state[name] for name in names[k::2]} for k in range(2)}
    for name, group in groups.items():
        torch.save(group, folder / name) if ending == ".bin" else save_file(group, folder / name)
    where = {tensor: name for name, group in groups.items() for tensor in group}
    (folder / index).write_text(json.dumps({"weight_map": where}))


def test_sharded_models_and_their_indexes() -> None:
    state = network()
    for number, (index, ending) in enumerate(
        [
            ("pytorch_model.bin.index.json", ".bin"),
            ("model.safetensors.index.json", ".safetensors"),
            ("diffusion_pytorch_model.safetensors.index.json", ".safetensors"),
            ("mine.safetensors.index.json", ".safetensors"),
        ]
    ):
        folder = Path(f"model{number}")
        sharded(folder, state, index, ending)
        assert same_bits(read(folder), state)
        assert same_bits(read(folder / index), state)
    # A diffusers folder keeps a variant beside.
    for file in list(Path("model2").glob("*index.json")):
        (Path("model2") / file.name.replace("safetensors", "fp16.safetensors")).write_text(file.read_text())
    assert same_bits(read("model2"), state)
    Path("model2/pytorch_model.bin.index.json").write_text("{}")
    assert same_bits(read("model2"), state)
    Path("model3/other.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="model3 has 2 models, such as mine"):
        open_input("model3")
    with pytest.raises(UserError, match=r"other.safetensors.index.json is damaged"):
        open_input("model3/other.safetensors.index.json")
    Path("model0/part-1.bin").unlink()
    with pytest.raises(UserError, match=r"part-1.bin is named in pytorch_model.bin.index.json but missing"):
        open_input("model0")
    Path("distributed").mkdir()
    Path("distributed/.metadata").touch()
    with pytest.raises(UserError, match="dcp_to_torch distributed"):
        open_input("distributed")
    Path("hub").mkdir()
    torch.save(state, "hub/pytorch_model.bin")
    torch.save({"lr": 1}, "hub/training_args.bin")
    assert same_bits(read("hub"), state)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (lambda name: f"module.{name}", lambda name: name),
        (lambda name: name, lambda name: f"model._orig_mod.{name}"),
        (lambda name: f"module.{name}", lambda name: f"_orig_mod.module.{name}"),
        (lambda name: name, lambda name: name.replace("lift.", "lift._orig_mod.")),
        (lambda name: f"net.{name}", lambda name: f"_fsdp_wrapped_module.{name}"),
    ],
)
def test_prefixes_of_wrappers(low: Any, high: Any, capsys: pytest.CaptureFixture[str]) -> None:
    state = network()
    states = [network(seed, near=state) for seed in (1, 2)]
    for name, one in zip(("low", "high"), states, strict=True):
        save(one, Path(f"{name}.safetensors"))
    plain = merged(Path(), "ccm", ["low.safetensors", "high.safetensors"], parameters={"alpha": 0.3}, output="plain")
    capsys.readouterr()
    for file, rename, one in zip(("low.pt", "high.pt"), (low, high), states, strict=True):
        save({rename(name): tensor for name, tensor in one.items()}, Path(file))
    for number, order in enumerate((["low.pt", "high.pt"], ["high.pt", "low.pt"])):
        alpha = 0.3 if number == 0 else -0.3
        made = merged(Path(), "ccm", order, parameters={"alpha": alpha}, output=f"out{number}")
        shared = "module." if high("x") == "_orig_mod.module.x" else ""
        assert same_bits(made, {shared + name: tensor for name, tensor in plain.items()})
        assert "prefixes of a wrapper are left out of its tensors' names" in capsys.readouterr().out


def test_equal_prefixes_stay_and_others_are_named() -> None:
    state = {"model.w": torch.ones(2), "model.b": torch.ones(2)}
    for name in ("low", "high"):
        save(state, Path(f"{name}.safetensors"))
    assert (
        merged(Path(), "ccm", ["low.safetensors", "high.safetensors"], parameters={"alpha": 0}).keys() == state.keys()
    )
    save({**state, "loss.weight": torch.ones(1)}, Path("high.safetensors"))
    save({"w": torch.ones(2), "b": torch.ones(2)}, Path("low.safetensors"))
    with pytest.raises(UserError, match=r"misses tensor .*it has model\.\w instead") as caught:
        merged(Path(), "ccm", ["low.safetensors", "high.safetensors"], parameters={"alpha": 0}, output="other")
    assert "one architecture" in str(caught.value)
    # Two models with another part of the same shape are not the same.
    save({"encoder.w": torch.ones(2)}, Path("low.safetensors"))
    save({"decoder.w": torch.ones(2)}, Path("high.safetensors"))
    with pytest.raises(UserError, match="misses tensor"):
        merged(Path(), "ccm", ["low.safetensors", "high.safetensors"], parameters={"alpha": 0}, output="other")


# --- values that are equal and not finite ---

METHODS = {
    "ccm": {"alpha": 0.3},
    "linear": {"weight": 0.4},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.4, "density": 0.5},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "slerp": {"t": 0.3},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_that_are_equal_in_all_models_are_copied(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.full((300, 300), float("-inf"), dtype=dtype).triu(1)
    mask[5, 6] = float("nan")
    base = {"mask": mask, "w": torch.randn(60, dtype=dtype)}
    for seed, name in enumerate(("base", "low", "high")):
        noise = 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(seed)).to(dtype)
        save({"mask": mask, "w": base["w"] + noise}, Path(f"{name}.safetensors"))
    pair = ["high.safetensors"] if method == "slerp" else ["low.safetensors", "high.safetensors"]
    words = {"parameters": METHODS[method], "base_model": "base.safetensors"}
    monkeypatch.setattr("shodh_moe.merging.stream.LARGEST_SLICE", BLOCK)
    made = merged(Path(), method, pair, **words)
    assert same_bits({"mask": made["mask"]}, {"mask": mask})
    assert f"mask has {300 * 299 // 2} NaN or infinite values, equal in all models and copied" in manifest_notes("out")
    drift = json.loads(Path("out/merge.json").read_text()).get("drift", {})
    assert "NaN" not in json.dumps(drift)
    # With the mask left out, the other tensors come out the same.
    for name in ("base", "low", "high"):
        save({"w": load_file(f"{name}.safetensors")["w"]}, Path(f"{name}.safetensors"))
    alone = merged(Path(), method, pair, output="alone", **words)
    assert same_bits(alone, {"w": made["w"]})


@pytest.mark.parametrize("other", [float("nan"), float("inf"), 0.0])
def test_infinities_that_differ_are_refused(other: float) -> None:
    mask = torch.full((3, 3), float("-inf")).triu(1)
    save({"mask": mask}, Path("low.safetensors"))
    changed = mask.clone()
    changed[0, 2] = other
    save({"mask": changed}, Path("high.safetensors"))
    with pytest.raises(UserError, match=r"mask has NaN or infinity, first at .*, unlike the other models"):
        merged(Path(), "ccm", ["low.safetensors", "high.safetensors"], parameters={"alpha": 0})
    assert not Path("out").exists()


def test_an_output_of_a_model_with_infinities_in_another_type() -> None:
    mask = torch.full((4, 4), float("-inf")).triu(1)
    save({"mask": mask}, Path("low.safetensors"))
    merge(config(Path(), "linear", ["low.safetensors"], parameters={"weight": 1}, dtype="float16"), Path("out"))
    assert torch.equal(load(Path("out"))["mask"], mask.half())
