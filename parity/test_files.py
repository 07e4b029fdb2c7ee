"""Writing files: what cannot be written is told, with its path and the cause, the old file is as it
was, and nothing is left beside it."""

import fcntl
import os
import resource
import threading
from contextlib import contextmanager

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast import CoMeTModel, CoMeTState, files
from fast.checkpoints import read_training, write_training
from fast.cupy_engine import CoMeTEngine
from fast.drawing import save_figure
from fast.files import atomic_save, atomic_write, check_writable
from fast.pretrained import save_published
from fast.tasks import passkey_report

from .assertions import assert_state_equal
from .reliability import small
from .strategies import random_model

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def model():
    return random_model(small({"qk_norm": True}), 0)  # as the published code wants it


@contextmanager
def disk_of(size):
    """No file can grow beyond so many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WRITERS = {
    "state": lambda m, path: m.new_state(3).save(path),
    "model.safetensors": lambda m, path: m.save_pretrained(path.parent),
    "config.json": lambda m, path: atomic_write(path, m.config.to_json()),
    "training": lambda m, path: write_training(path, m.state_dict(), {"step": 3}),
    "official/model.safetensors": lambda m, path: save_published(path.parent, m.config, m.weights),
    "results.json": lambda m, path: passkey_report.save([], passkey_report.Setting(), path),
    "picture.png": lambda m, path: save_figure(plt.figure(), path),
    "picture.svg": lambda m, path: save_figure(plt.figure(), path),
}
writers = pytest.mark.parametrize("name", WRITERS)


@writers
def test_what_cannot_be_written_is_told_with_its_path_and_cause(model, tmp_path, name):
    path = tmp_path / name
    path.mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as told:
        WRITERS[name](model, path)
    assert told.value.filename == str(path)
    path.rmdir()
    file = tmp_path / "file"
    file.write_text("of others")
    with pytest.raises(NotADirectoryError, match="nothing was written") as told:
        WRITERS[name](model, file / name)
    assert told.value.filename == str(file / name)
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is not a regular file; give one"):
        WRITERS[name](model, path)
    path.unlink()
    with pytest.raises(OSError, match="nothing was written") as told:
        WRITERS[name](model, type(path)("/proc/self/no") / name)
    assert told.value.filename == f"/proc/self/no/{name}"
    assert file.read_text() == "of others"


@writers
def test_a_full_disk_leaves_the_old_file(model, tmp_path, name):
    path = tmp_path / name
    WRITERS[name](model, path)
    before = files_of(path.parent)
    for share in (0, 0.5, 0.99):
        with (
            disk_of(int(share * len(before[path.name]))),
            pytest.raises(OSError, match=r"nothing was written \(File too large\)") as told,
        ):
            WRITERS[name](model, path)
        assert told.value.filename == str(path)
    assert files_of(path.parent) == before


@given(room=st.integers(0, 6000))
def test_a_disk_that_is_full_anywhere_leaves_the_old_state(model, tmp_path_factory, room):
    folder = tmp_path_factory.mktemp("disk")
    path, ids = folder / "state", torch.tensor([[1, 2, 3, 4, 5, 6]])
    old, new = model.new_state(), model(ids, logits="none").state
    old.save(path)
    expected = new
    try:
        with disk_of(room):
            new.save(path)
    except OSError:
        expected = old
    assert_state_equal(CoMeTState.load(path, model), expected, "the state after a full disk")
    assert [p.name for p in folder.iterdir()] == ["state"]


def test_what_cannot_be_read_is_told_with_its_path(model, tmp_path):
    model.save_pretrained(tmp_path)
    for read in (
        lambda: CoMeTState.load(tmp_path, model),
        lambda: read_training(tmp_path),
        lambda: passkey_report.load(tmp_path),
    ):
        with pytest.raises(IsADirectoryError) as told:
            read()
        assert told.value.filename == str(tmp_path)
    (tmp_path / "state").symlink_to("/proc/self/mem")  # a regular file that cannot be read
    with pytest.raises((OSError, ValueError), match="/state"):
        CoMeTState.load(tmp_path / "state", model)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).rename(tmp_path / "kept")
        (tmp_path / name).mkdir()
        for load in (CoMeTModel.from_pretrained, on_numpy):
            with pytest.raises(IsADirectoryError) as told:
                load(tmp_path)
            assert told.value.filename == str(tmp_path / name)
        (tmp_path / name).rmdir()
        (tmp_path / "kept").rename(tmp_path / name)
    with pytest.raises(NotADirectoryError):
        CoMeTModel.from_pretrained(tmp_path / "config.json" / "model")


def on_numpy(folder):
    return CoMeTEngine.from_pretrained(folder, library="numpy")


def test_a_loaded_model_does_not_change_with_its_file(model, tmp_path):
    """Another program may write over the file, as `cp` does; we put a new one in its place."""
    model.save_pretrained(tmp_path)
    model.new_state().save(tmp_path / "state")
    loaded, state = (
        CoMeTModel.from_pretrained(tmp_path),
        CoMeTState.load(tmp_path / "state", model),
    )
    for name in ("model.safetensors", "state"):
        with (tmp_path / name).open("r+b") as file:
            file.write(b"\x3f" * (tmp_path / name).stat().st_size)
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in loaded.state_dict().items())
    assert_state_equal(state, model.new_state(), "the loaded state")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, there):
    (tmp_path / "far").mkdir()
    place, link = tmp_path / "far" / "file", tmp_path / "link"
    link.symlink_to("far/file")
    if there:
        place.write_text("old")
    atomic_write(link, "new")
    assert link.is_symlink()
    assert place.read_text() == "new"
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "far", place, link]
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(OSError, match="link"):
        atomic_write(link, "new")
    assert link.is_symlink(), "a loop is left alone"


def test_a_file_keeps_its_mode(tmp_path):
    path, before = tmp_path / "file", os.umask(0o027)
    try:
        atomic_write(path, "new")
        assert path.stat().st_mode & 0o777 == 0o640
        for mode in (0o600, 0o664, 0o444):
            path.chmod(mode)
            atomic_write(path, oct(mode))
            assert path.stat().st_mode & 0o777 == mode
            assert path.read_text() == oct(mode)
    finally:
        os.umask(before)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    left = [tmp_path / f".file.abcdefg{i}.unfinished" for i in range(3)]
    others = [
        tmp_path / name
        for name in (".file.abcdefgh", ".file.toolong99.unfinished", ".other.abcdefgh.unfinished")
    ]
    for path in left + others:
        path.write_text("part of a file")
    with left[0].open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as its writer does
        check_writable(tmp_path / "file")
        assert sorted(tmp_path.iterdir()) == sorted([left[0], *others])
    atomic_write(tmp_path / "file", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "file", *others])


def test_without_locks_files_are_whole_and_nothing_is_removed(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(files, "fcntl", None)
    left = tmp_path / ".page.md.abcdefgh.unfinished"
    left.write_text("half a")
    for text in ("first", "second"):
        atomic_write(tmp_path / "page.md", text)
    assert (tmp_path / "page.md").read_text() == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", left.name}


def test_writers_of_one_file_do_not_meet(tmp_path):
    """None fails, none mixes with another, none removes what another is writing."""
    path, failed = tmp_path / "file", []

    def write(number):
        try:
            for _ in range(30):
                atomic_write(path, str(number) * 5000)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    content = path.read_text()
    assert content == content[0] * 5000
    assert list(tmp_path.iterdir()) == [path]


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    kinds=st.lists(st.sampled_from(["float64", "float32", "bfloat16", "int64", "uint8"])),
)
def test_our_files_are_those_of_the_library(tmp_path_factory, shapes, kinds):
    from safetensors.torch import load_file

    path = tmp_path_factory.getbasetemp() / "library"
    arrays = {
        f"x{i}": torch.arange(torch.Size(shape).numel()).view(shape).to(getattr(torch, kind))
        for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
    }
    atomic_save(path, arrays, {"format": "pt"})
    found = load_file(path)
    assert found.keys() == arrays.keys()
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x)
