"""GGUF files: what is sound is read as the package ``gguf`` reads it; the rest is one line."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from costmodel.gguf.header import read_header
from costmodel.gguf.model import GgufModel
from executor.checkpoint.tensor_rows import TensorRows
from profiles.encodings import BLOCK_ENCODINGS
from profiles.errors import InputError
from tests.executor.gguf_files import (
    ARRAY,
    TEXT,
    U64,
    gguf_bytes,
    header,
    metadatum,
    tensor_info,
    text,
    texts,
    u32,
)

TENSORS = {
    "token_embd.weight": ("Q8_0", (3, 64)),
    "blk.0.attn_q.weight": ("Q4_K", (2, 512)),
    "blk.0.ffn_gate_exps.weight": ("MXFP4", (2, 3, 32)),
    "output_norm.weight": ("F32", (5,)),
}
METADATA = [
    metadatum("general.architecture", TEXT, text("llama")),
    u32("llama.block_count", 1),
    metadatum("llama.rope.freq_base", 6, struct.pack("<f", 10000.0)),
    metadatum("general.is_sound", 7, b"\1"),
    texts("tokenizer.ggml.tokens", ["<s>", "\u00e9", b"\xc3"]),
    metadatum("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ3f", 6, 3, 0, -1, 2.5)),
    metadatum("tokenizer.ggml.flags", ARRAY, struct.pack("<IQ2B", 7, 2, 0, 1)),
]


def _written(folder: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _fails(path: Path, *words: str) -> None:
    """Opening is one line, before memory is taken."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            GgufModel.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
    assert peak < 2**20


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    path = _written(tmp_path, gguf_bytes(METADATA, TENSORS))
    found = read_header(path)
    scores = found.metadata["tokenizer.ggml.scores"]
    assert scores.tolist() == [0.0, -1.0, 2.5]
    assert found.metadata["tokenizer.ggml.flags"].tolist() == [False, True]
    assert found.metadata["tokenizer.ggml.tokens"] == ("<s>", "\u00e9", "\ufffd")
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["llama.rope.freq_base"] == 10000.0
    assert found.metadata["general.is_sound"] is True
    assert {n: (e.dtype, e.shape) for n, e in found.tensors.items()} == TENSORS
    entries = list(found.tensors.values())
    assert [e.num_bytes for e in entries] == [3 * 68, 2 * 288, 2 * 3 * 17, 20]
    data = path.read_bytes()
    start = entries[0].offset_bytes
    for entry in entries:
        assert entry.offset_bytes % 32 == 0
        assert data[entry.offset_bytes] == (entry.offset_bytes - start) % 251


def test_the_package_reads_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(7)
    writer.add_token_list(["a", "b\u20ac", ""])
    writer.add_array("llama.sizes", [1, -2, 3])
    writer.add_custom_alignment(64)
    values = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    for name in ("F32", "F16", "Q4_0", "Q5_1", "Q8_0", "BF16"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GgufModel.open(tmp_path / "model.gguf")
    theirs = gguf.GGUFReader(tmp_path / "model.gguf")
    assert len(ours.tensors) == len(theirs.tensors) == 6
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.offset_bytes, entry.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert entry.dtype == tensor.tensor_type.name == tensor.name
        assert entry.shape == (6, 512) == tuple(reversed(tensor.shape.tolist()))
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == (
                tuple(field.contents()) if key.endswith("tokens") else field.contents()
            )


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "begins with"),
        (b"GGU", "begins with"),
        (b"GGML" + bytes(60), "GGML"),
        (b"GGUF\3\0", "beyond byte 6"),
        (header([], [], version=1) + bytes(64), "version 1"),
        (struct.pack("<4sI", b"GGUF", 3 << 24) + bytes(64), "big-endian"),
        (header([], [], num_tensors=2**60) + bytes(64), f"{2**60} tensors"),
        (header([], [], num_metadata=2**63) + bytes(64), f"{2**63} keys"),
        (header([metadatum("a", TEXT, struct.pack("<Q", 2**60))], []), f"{2**60} bytes"),
        (header([metadatum("a", TEXT, struct.pack("<Q", 2**20))], []), "beyond"),
        (header([text(b"\xff") + bytes(5)], []), "UTF-8"),
        (header([metadatum("a", 13, bytes(8))], []), "type 13 of a"),
        (header([metadatum("a", 7, b"\2")], []), "2 in a"),
        (header([metadatum("a", ARRAY, struct.pack("<IQ", TEXT, 2**60))], []), "texts in a"),
        (header([metadatum("a", ARRAY, struct.pack("<IQ", U64, 2**60))], []), "beyond"),
        (header([metadatum("a", ARRAY, struct.pack("<IQ", ARRAY, 1))], []), "type 9 of a"),
        (header([u32("a", 1), u32("a", 1)], []), "a twice"),
        (header([u32("general.alignment", 24)], []), "24"),
        (header([u32("general.alignment", 0)], []), "power of two"),
        (header([], [tensor_info("w", (), 0, 0)]) + bytes(64), "0 dimensions"),
        (header([], [tensor_info("w", (1,) * 5, 0, 0)]) + bytes(64), "5 dimensions"),
        (header([], [tensor_info("w", (0, 4), 0, 0)]) + bytes(64), "[0, 4]"),
        (header([], [tensor_info("w", (4,), 999, 0)]) + bytes(64), "unknown type 999"),
        (header([], [tensor_info("w", (256,), 16, 0)]) + bytes(640), "IQ2_XXS"),
        (header([], [tensor_info("w", (48,), 2, 0)]) + bytes(640), "multiple of 32"),
        (header([], [tensor_info("w", (2**62, 2**62), 0, 0)]) + bytes(64), "up to byte"),
        (header([], [tensor_info("w", (4,), 0, 2**63)]) + bytes(64), "up to byte"),
        (header([], [tensor_info("w", (4,), 0, 8)]) + bytes(64), "offset 8"),
        (header([], [tensor_info("w", (4,), 0, 0)] * 2) + bytes(64), "twice"),
        (
            header([], [tensor_info("v", (9,), 0, 0), tensor_info("w", (9,), 0, 32)]) + bytes(99),
            "offset 32 of w",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told(tmp_path: Path, data: bytes, word: str) -> None:
    _fails(_written(tmp_path, data), word)


def test_a_file_that_is_cut_anywhere_is_told(tmp_path: Path) -> None:
    data = gguf_bytes(METADATA, TENSORS)
    path = tmp_path / "model.gguf"
    whole = read_header(_written(tmp_path, data))
    end = max(entry.offset_bytes + entry.num_bytes for entry in whole.tensors.values())
    for length in [*range(0, end - 700, 7), *range(end - 40, end)]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            read_header(path)
    path.write_bytes(data[:end])
    read_header(path)
    with pytest.raises(InputError, match="readable"):
        read_header(tmp_path / "missing.gguf")


def test_broken_headers_are_told(tmp_path: Path) -> None:
    """Any bytes overwritten: one line, or tensors within the file and apart from each other."""
    random = Random(0)
    sound = gguf_bytes(METADATA, TENSORS)
    path = _written(tmp_path, sound)
    accepted = 0
    for _ in range(3000):
        data = bytearray(sound)
        for _ in range(random.randint(1, 3)):
            at, size = random.randrange(720), random.choice((1, 1, 2, 4, 8))
            data[at : at + size] = random.choice(
                (bytes(size), b"\xff" * size, random.randbytes(size))
            )
        # Nothing is truncated: some file systems then wait for the disk.
        with path.open("r+b") as file:
            file.write(data)
        try:
            found = read_header(path)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            continue
        accepted += 1
        end = 0
        for entry in sorted(found.tensors.values(), key=lambda entry: entry.offset_bytes):
            assert end <= entry.offset_bytes
            end = entry.offset_bytes + entry.num_bytes
        assert end <= len(data)
    assert 300 < accepted < 2700


def _part(number: int, count: int, total: int, name: str) -> bytes:
    keys = [u32("split.no", number), u32("split.count", count), u32("split.tensors.count", total)]
    first = [metadatum("general.architecture", TEXT, text("llama"))] if number == 0 else []
    return gguf_bytes([*first, *keys], {name: ("F32", (8,))})


def test_parts_are_joined(tmp_path: Path) -> None:
    for number in range(3):
        data = _part(number, 3, 3, f"w{number}")
        path = _written(tmp_path, data, f"m-{number + 1:05d}-of-00003.gguf")
    model = GgufModel.open(path)
    assert list(model.tensors) == ["w0", "w1", "w2"]
    assert model.metadata["general.architecture"] == "llama"
    assert len({entry.path for entry in model.tensors.values()}) == 3
    second = tmp_path / "m-00002-of-00003.gguf"
    second.write_bytes(_part(2, 3, 3, "w2"))
    _fails(path, "part 2 of 3", "part 1 of 3")
    second.write_bytes(_part(1, 3, 3, "w0"))
    _fails(path, "w0", "each tensor in one part")
    second.write_bytes(gguf_bytes([], {"w1": ("F32", (8,))}))
    _fails(path, "part None")
    second.unlink()
    _fails(path, "00002-of-00003")
    renamed = path.rename(tmp_path / "other.gguf")
    _fails(renamed, "NAME-00001-of-00003.gguf")


def test_a_model_is_parsed_once_while_its_parts_stay_as_they_are(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{number + 1:05d}-of-00002.gguf" for number in range(2)]

    def write(number: int, tensor: str, seconds: int) -> None:
        paths[number].write_bytes(_part(number, 2, 2, tensor))
        os.utime(paths[number], (seconds, seconds))

    write(0, "w0", 100)
    write(1, "w1", 100)
    first = GgufModel.open(paths[0])
    assert GgufModel.open(paths[0]) is first
    # Of the same size, and changed at another time.
    write(1, "v1", 101)
    assert list(GgufModel.open(paths[0]).tensors) == ["w0", "v1"]
    # Just written: it may change again at the same time.
    paths[1].write_bytes(_part(1, 2, 2, "u1"))
    found = GgufModel.open(paths[0])
    assert list(found.tensors) == ["w0", "u1"] and GgufModel.open(paths[0]) is not found


def test_texts_longer_than_what_is_read_at_once_are_whole(tmp_path: Path) -> None:
    random = Random(1)
    tokens = [chr(97 + i % 26) * random.choice((0, 1, 9, 2**17, 2**19)) for i in range(60)]
    data = header([texts("a", tokens), u32("b", 7)], [])
    found = read_header(_written(tmp_path, data)).metadata
    assert found["a"] == tuple(tokens) and found["b"] == 7


def test_parts_of_another_release_are_told(tmp_path: Path) -> None:
    for number in range(2):
        data = _part(number, 2, 5, f"w{number}")
        path = _written(tmp_path, data, f"m-{number + 1:05d}-of-00002.gguf")
    _fails(path, "2 tensors", "5")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(
        gguf_bytes([metadatum("split.count", TEXT, text("2"))], {})
    )
    _fails(path, "whole number")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "MXFP4", "F32"])
def test_rows_are_read_and_their_scales_are_numbers(tmp_path: Path, name: str) -> None:
    encoding = BLOCK_ENCODINGS[name]
    shape = (5, 2 * encoding.block_elements)
    path = _written(tmp_path, gguf_bytes([], {"w": (name, shape)}))
    entry = GgufModel.open(path).tensors["w"]
    rows = torch.empty(3, encoding.row_bytes(shape[1]), dtype=torch.uint8)
    start = entry.offset_bytes + rows.shape[1]
    sound = bytearray(path.read_bytes())
    for at in encoding.halves_at:
        # Bytes that count upwards make an infinite scale now and then.
        for block in range(2 * shape[0]):
            begin = entry.offset_bytes + block * encoding.block_bytes + at
            sound[begin : begin + 2] = b"\x00\x3c"
    path.write_bytes(sound)
    TensorRows(entry).read(1, rows)
    assert bytes(rows.flatten().tolist()) == sound[start : start + rows.numel()]
    for at in encoding.halves_at or (0,):
        broken = sound.copy()
        begin = start + rows.numel() - encoding.block_bytes + at
        broken[begin : begin + 2] = b"\xff\x7f"
        path.write_bytes(broken)
        if name == "F32":
            TensorRows(entry).read(1, rows)
        else:
            with pytest.raises(InputError, match="no number"):
                TensorRows(entry).read(1, rows)
