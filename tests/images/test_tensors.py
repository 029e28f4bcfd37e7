"""Files of tensors are read whatever the case of their names, and damaged ones are refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unbraid.base.errors import UsageError
from unbraid.images.tensors import read_tensor_file

ONE = torch.arange(24.0).reshape(2, 3, 4)


def with_header(path, header):
    """A .npy file of that header, with no numbers behind it."""
    text = header.encode().ljust(118 - 1) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def test_endings_in_capitals_are_read(tmp_path):
    np.save(tmp_path / "one.npy", ONE.numpy())
    (tmp_path / "one.npy").rename(tmp_path / "one.NPY")
    save_file({"one": ONE}, tmp_path / "one.SAFETENSORS")
    torch.save(ONE, tmp_path / "one.PT")
    assert torch.equal(read_tensor_file(tmp_path / "one.NPY"), ONE)
    assert torch.equal(read_tensor_file(tmp_path / "one.SAFETENSORS")["one"], ONE)
    assert torch.equal(read_tensor_file(tmp_path / "one.PT"), ONE)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    begin = "{'descr': '<f4', 'fortran_order': False, 'shape': ("
    with_header(tmp_path / "huge.npy", f"{begin}{10**16},)}}")
    with_header(tmp_path / "open.npy", f"{begin}2,")
    (tmp_path / "cut.npy").write_bytes(b"PK\x03\x04 and no more")
    torch.save(ONE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    for at in range(0, len(content), 7):
        (tmp_path / f"{at}.pt").write_bytes(content[:at])
    (tmp_path / "old.pt").unlink()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UsageError, match=rf"{path.name} cannot be read \(it is damaged or "):
            read_tensor_file(path)


def test_what_holds_more_than_tensors_is_not_said_to_be_trusted(tmp_path):
    torch.save({"one": ONE, "more": pytest.raises}, tmp_path / "more.pt")
    np.save(tmp_path / "more.npy", np.array([{}]), allow_pickle=True)
    for name in ("more.pt", "more.npy"):
        with pytest.raises(UsageError, match="holds more than tensors") as caught:
            read_tensor_file(tmp_path / name)
        assert "weights_only" not in str(caught.value)
        assert "allow_pickle" not in str(caught.value)
