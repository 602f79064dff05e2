"""A state dict in one file: exact, whole or as it was, and nothing in it is executed."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nlpfast.data.lines import DataError
from nlpfast.models.parameter_file import read_parameters, write_parameters

STATE = {"a": torch.arange(6.0).view(2, 3).T, "b.weight": torch.tensor([1.5], dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def same(found):
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_written_and_read_again():
    facts = {"variant": "vanilla", "vocabulary": ["□", "é"]}
    write_parameters("file", STATE, facts)
    found, about = read_parameters("file")
    same(found)
    assert about == facts
    # the tensors are no view of the file
    write_parameters("file", {"a": torch.zeros(3)}, {})
    same(found)
    assert sorted(path.name for path in Path().iterdir()) == ["file"]


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read(zipped):
    torch.save(STATE, "file", _use_new_zipfile_serialization=zipped)
    found, about = read_parameters("file")
    same(found)
    assert about == {}


def test_safetensors_of_others_are_read():
    save_file({name: tensor.contiguous() for name, tensor in STATE.items()}, "file", {"format": "pt"})
    found, about = read_parameters("file")
    same(found)
    assert about == {}


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_executed(zipped):
    torch.save({"a": Evil()}, "file", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match="file: is damaged, or holds more than tensors"):
        read_parameters("file")
    Path("file").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(DataError, match=r"^file: "):
        read_parameters("file")
    assert not Path("executed").exists()


@pytest.mark.parametrize("source", ["ours", "torch"])
def test_damaged_files_are_named(source):
    if source == "ours":
        write_parameters("file", STATE, {})
    else:
        torch.save(STATE, "file")
    content = Path("file").read_bytes()
    for size in (0, 1, 2, 3, 9, len(content) // 2, len(content) - 1):
        Path("file").write_bytes(content[:size])
        with pytest.raises(DataError, match=r"^file: (not a readable file of parameters|is damaged)"):
            read_parameters("file")


@pytest.mark.parametrize("found", [[torch.zeros(1)], {"a": 1}, torch.zeros(2)])
def test_other_content_is_no_state_dict(found):
    torch.save(found, "file")
    with pytest.raises(DataError, match="no state dict; give a file that pretrain or finetune wrote"):
        read_parameters("file")


def test_facts_must_be_a_dictionary():
    for text, message in (("[1]", "its facts about the model are damaged"), ("{", "not a readable file")):
        save_file({"a": torch.zeros(1)}, "file", {"nlpfast": text})
        with pytest.raises(DataError, match=message):
            read_parameters("file")


def test_files_that_cannot_be_read_or_written():
    for path in ("nowhere", "."):
        with pytest.raises(DataError, match=r"cannot be read \("):
            read_parameters(path)
    with pytest.raises(OSError, match="no/file: cannot be written"):
        write_parameters("no/file", STATE, {})
