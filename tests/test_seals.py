"""Files that show when they were damaged, and those that carry no digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optpipe import seals, store
from optpipe.types import StepResult

RESULT = StepResult("key", "scores", (1.0, 2.5), 0.5)
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(7),
    "c": torch.ones(3, dtype=torch.bfloat16),
}


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_sealed_json_is_json_whose_last_key_is_the_digest_of_the_rest() -> None:
    plain, sealed = store.to_json(RESULT), store.to_sealed(RESULT)
    assert json.loads(sealed) == json.loads(plain) | {"seal": hashlib.sha256(plain.encode()).hexdigest()}
    assert store.from_json(StepResult, sealed) == store.from_json(StepResult, plain) == RESULT


def test_no_bit_of_sealed_json_can_flip_and_change_what_is_read() -> None:
    sealed = store.to_sealed(RESULT).encode()
    refused = 0
    for place in range(len(sealed)):
        for bit in range(8):
            try:
                found = store.from_json(StepResult, flipped(sealed, place, bit))
            except ValueError:
                refused += 1
            else:
                assert found == RESULT, (place, bit)
    assert refused > 6 * len(sealed)  # all but those that hit the name of the seal


def test_a_digit_that_reads_as_another_is_refused() -> None:
    sealed = store.to_sealed(RESULT)
    with pytest.raises(seals.DamagedError, match="the seal at its end is of another content"):
        store.from_json(StepResult, sealed.replace("2.5", "2.6"))


def test_more_keys_are_sealed_too() -> None:
    sealed = store.to_sealed(RESULT, "x")
    assert store.from_json(StepResult, sealed) == RESULT
    with pytest.raises(seals.DamagedError):
        store.from_json(StepResult, sealed.replace('"x"', '"y"'))


def test_no_byte_of_tensors_can_change_and_be_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    store.save_tensors(path, TENSORS)
    whole = path.read_bytes()
    assert seals.is_whole(path)
    for place in range(len(whole)):
        path.write_bytes(flipped(whole, place, place % 8))
        if seals.is_whole(path):  # it hit the name of the digest, not the tensors
            found = seals.read_tensors(path)
            assert found.keys() == TENSORS.keys()
            assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    for size in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not seals.is_whole(path)


def test_tensors_that_somebody_else_wrote_have_no_digest_and_are_taken(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    assert seals.is_whole(tmp_path / "theirs.safetensors")


def test_what_is_missing_is_not_whole_and_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    assert not seals.is_whole(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        seals.is_whole(tmp_path)


def test_the_digest_of_tensors_is_of_names_types_shapes_and_values() -> None:
    digest = seals.tensors_sha256({"a": torch.zeros(2, 3)})
    others = (
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.full((2, 3), -0.0)},
    )
    assert digest not in {seals.tensors_sha256(other) for other in others}
    assert seals.tensors_sha256({"a": torch.zeros(3, 2).T}) == digest


@pytest.mark.parametrize("size", [0, 1, seals.DIGEST, 3_000_000])
def test_a_file_ends_with_the_digest_of_what_is_before_it(tmp_path: Path, size: int) -> None:
    content, path = bytes(size), tmp_path / "array"
    path.write_bytes(content + hashlib.sha256(content).digest())
    assert seals.ends_with_digest(path)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert not seals.ends_with_digest(path)
    path.write_bytes(content[: seals.DIGEST - 1])
    assert not seals.ends_with_digest(path)
