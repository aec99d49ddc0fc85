"""Test that files of torch.save give what torch.load gives, or are refused, unexecuted."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow.formats import CheckpointFormatError
from anyflow.formats.readers import TorchReader
from anyflow.formats.torch_files import TorchFile
from anyflow.formats.torch_pickle import MAX_TUPLE_DEPTH


def refused(file: Path) -> str:
    with pytest.raises(CheckpointFormatError) as raised:
        reader = TorchReader(file, None)
        for name in reader.infos:
            reader.read(name)
    assert str(file) in str(raised.value)
    return str(raised.value)


@pytest.fixture
def state(generator: torch.Generator) -> dict[str, Any]:
    """Draw tensors of many types and layouts, some of which share a storage."""
    base = torch.randn(6, 8, generator=generator)
    return {
        "whole": base,
        "columns": base[:, 3:7],
        "transposed": base.T,
        "every second": base[1::2, ::3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
        **{
            str(t): base.to(t)
            for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
        },
        "fp8": base.to(torch.float8_e4m3fn),
        "uint16": torch.arange(5).to(torch.uint16),
    }


@pytest.mark.parametrize("way", ["zip", "legacy", "no CRC", "compressed"])
def test_values_are_those_of_torch_load(way: str, state: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    if way == "legacy":
        state = {name: t for name, t in state.items() if name not in ("fp8", "uint16")}
    torch.serialization.set_crc32_options(way != "no CRC")
    try:
        torch.save(state, file, _use_new_zipfile_serialization=way != "legacy")
    finally:
        torch.serialization.set_crc32_options(True)
    if way == "compressed":
        repack(
            file, lambda packed, name, content: packed.writestr(name, content, zipfile.ZIP_DEFLATED)
        )
    expected = torch.load(file, weights_only=True, mmap=False)
    reader = TorchReader(file, None)
    assert reader.infos.keys() == expected.keys()
    for name, tensor in expected.items():
        assert reader.infos[name].shape == tuple(tensor.shape)
        read = reader.read(name)
        assert read.dtype == tensor.dtype and torch.equal(as_bytes(read), as_bytes(tensor)), name


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def repack(file: Path, write: Callable[[zipfile.ZipFile, str, bytes], Any]) -> None:
    with zipfile.ZipFile(file) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w") as packed:
        for name, content in contents.items():
            write(packed, name, content)


def test_files_of_the_other_byte_order_give_the_same_values(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    torch.save({"x": values}, tmp_path / "big.pt")

    def swap(packed: zipfile.ZipFile, name: str, content: bytes) -> None:
        if name.endswith("byteorder"):
            content = b"big"
        elif "/data/" in name:
            content = struct.pack(">6f", *values.tolist())
        packed.writestr(name, content)

    repack(tmp_path / "big.pt", swap)
    assert torch.equal(TorchReader(tmp_path / "big.pt", None).read("x"), values)


@pytest.mark.parametrize("change", [-4, 4, 400])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_entry_of_another_size_than_its_tensor_is_refused(
    change: int, method: int, tmp_path: Path
) -> None:
    torch.save({"x": torch.arange(20.0), "y": torch.zeros(5)}, tmp_path / "model.pt")

    def resize(packed: zipfile.ZipFile, name: str, content: bytes) -> None:
        sized = content[:change] if change < 0 else content + bytes(change)
        packed.writestr(name, sized if name.endswith("data/0") else content, method)

    repack(tmp_path / "model.pt", resize)
    assert f"has {80 + change} bytes, but its tensors need 80" in refused(tmp_path / "model.pt")


def test_absent_doubled_overlapping_and_damaged_entries_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    tensors = {"x": torch.arange(20.0), "y": torch.ones(20)}
    torch.save(tensors, file)
    sound = file.read_bytes()
    repack(
        file,
        lambda packed, name, content: name.endswith("data/1") or packed.writestr(name, content),
    )
    assert "has no model/data/1" in refused(file)
    file.write_bytes(sound)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("model/data/0", bytes(80))
    assert "have one name" in refused(file)
    position = sound.index(tensors["y"].numpy().tobytes())
    file.write_bytes(sound[:position] + b"\1" + sound[position + 1 :])
    assert "data/1 in it is damaged: its CRC-32" in refused(file)
    directory = sound.index(b"PK\1\2")
    first, second = (
        sound.index(name, directory) - 46 for name in (b"model/data/0", b"model/data/1")
    )
    moved = bytearray(sound)
    # both entries point at the first one
    moved[second + 42 : second + 46] = sound[first + 42 : first + 46]
    file.write_bytes(moved)
    assert "another name in its header" in refused(file)
    for size in (0, 3, 100, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:size])
        refused(file)


@pytest.mark.parametrize(
    "arguments",
    [
        (0, (9,), (1,)), (5, (4,), (1,)), (-1, (4,), (1,)), (0, (4,), (-1,)), (0, (2, 2), (1,)),
        (0, (2, 2), (8, 1)),
        (0, (10**30,), (0,)), (0, (10**9,), (0,)), (0.0, (4,), (1,)), (0, (True,), (1,)),
        (0, ("4",), (1,)),
        (0, [4], [1]), (2**62, (4,), (1,)),
    ],
)  # fmt: skip
def test_a_tensor_outside_of_its_storage_is_refused(arguments: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"x": torch.arange(8.0)}, file)
    repack(file, lambda packed, name, content: packed.writestr(name, tensor_pickle(arguments))
           if name.endswith("data.pkl") else packed.writestr(name, content))  # fmt: skip
    refused(file)


def tensor_pickle(arguments: Any) -> bytes:
    """Pickle what torch.save writes for one tensor, of any offset, size and strides."""

    class Stored:
        pass

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Stored(), *arguments, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return (
                ("storage", torch.FloatStorage, "0", "cpu", 8) if isinstance(obj, Stored) else None
            )

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"x": Rebuilt()})
    return stream.getvalue()


def with_pickle(file: Path, content: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", content)
    return file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02N" + b"r" + struct.pack("<L", 2**31 - 1) + b".", "places in the memo"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "bytearray8"),
        (
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
            "should hold a dictionary",
        ),
        (b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns.", f"more than {MAX_TUPLE_DEPTH} deep"),
        (b"\x80\x02}(" + b"Nq\x00" + b"\x30" * 3 + b".", "damaged"),
        (b"\x80\x02X" + struct.pack("<L", 2**32 - 1) + b"x.", "damaged"),
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "needs Python code"),
    ],
    ids=["memo", "buffer", "bytearray", "tuples", "stack", "text", "code"],
)
def test_a_pickle_that_asks_for_memory_is_refused_without_it(
    content: bytes, message: str, tmp_path: Path
) -> None:
    file = with_pickle(tmp_path / "model.pt", content)
    tracemalloc.start()
    try:
        assert message in refused(file)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_zip_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pt"
    torch.save({"x": torch.zeros(10_000_000)}, file)
    repack(file, lambda packed, name, content: packed.writestr(name, content, zipfile.ZIP_DEFLATED))
    assert "would unpack to" in refused(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(2**25))
    assert "bytes" in refused(file)


def test_other_archives_are_named_for_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.jit.script(nn.Linear(2, 2)).save(file)
    assert "TorchScript" in refused(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "none")
    assert "not of torch.save" in refused(file)
    file.write_bytes(pickle.dumps({"x": 3}))
    assert "not a file of torch.save" in refused(file)
    torch.save(nn.Linear(2, 2), file)
    assert "needs Python code" in refused(file)


def test_a_legacy_file_is_checked_against_its_size(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(
        {"x": torch.arange(50.0), "y": torch.ones(3)}, file, _use_new_zipfile_serialization=False
    )
    sound = file.read_bytes()
    for size in (20, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:size])
        refused(file)
    file.write_bytes(sound.replace(struct.pack("<q", 50), struct.pack("<q", 49)))
    assert "has 49 elements, but its tensors need 50" in refused(file)


def test_what_is_no_tensor_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    """Save a training file's other values, which torch.load(weights_only=True) takes, too."""
    file = tmp_path / "model.pt"
    others = {
        "step": 3,
        "sizes": torch.Size([2]),
        "bytes": b"\xff",
        "set": {1},
        "device": torch.device("cpu"),
    }
    torch.save(
        {"ema": {"x": torch.ones(2)}, "others": others, "sparse": torch.eye(3).to_sparse()}, file
    )
    torch.load(file, weights_only=True)
    assert torch.equal(TorchReader(file, None).read("x"), torch.ones(2))
    assert TorchFile(file).content["others"]["step"] == 3
    torch.save({"x": torch.ones(2, dtype=torch.complex64).conj()}, file)
    assert "not supported" in refused(file)
