"""Saving a folder of AdapterHub: what a crash leaves, and what processes that save at the same time meet."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hub_helpers import bert, randomise

from adapter_ops.integrations.adapterhub import files, load_adapterhub, save_adapterhub
from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.tasks import add_adapter, list_adapters


def test_saving_is_all_or_nothing(folder, monkeypatch):
    model = bert()
    load_adapterhub(model, folder)
    before = (folder / "pytorch_adapter.bin").read_bytes()
    torch.manual_seed(5)
    randomise(model, "adapter_ops")
    real, failed = os.replace, []

    def full(*args):
        raise OSError("disk full")

    def full_once(source, target):
        if target == folder and not failed:
            failed.append(source)
            full()
        real(source, target)

    for module, name, fail in ((torch, "save", full), (os, "fsync", full), (os, "replace", full_once)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(OSError, match="disk full"):
                save_adapterhub(model, folder, "a")
        assert [path.name for path in folder.parent.iterdir()] == ["a"]
        assert (folder / "pytorch_adapter.bin").read_bytes() == before
    save_adapterhub(model, folder, "a")
    assert (folder / "pytorch_adapter.bin").read_bytes() != before
    assert [path.name for path in folder.parent.iterdir()] == ["a"]


def test_leftovers_of_dead_saves_are_removed(folder, monkeypatch):
    """Of dead processes, and what is an hour old; nothing of a living process, of another host or of others' names."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, random_part = files.host(), "0123456789abcdef"
    other_host = "f" * 8 if host != "f" * 8 else "0" * 8
    here = folder.parent
    gone = here / f".a.{dead.pid}.{host}{random_part}.tmp"
    kept = [
        f".a.{os.getppid()}.{host}{random_part}.tmp",
        f".a.{dead.pid}.{other_host}{random_part}.tmp",
        f".b.{dead.pid}.{host}{random_part}.tmp",
        f".a.b.{dead.pid}.{host}{random_part}.tmp",
        f".a.{dead.pid}.{host}{random_part}",
        f"xa.{dead.pid}.{host}{random_part}.tmp",
    ]
    for path in (gone, *(here / name for name in kept)):
        path.mkdir()
        (path / "adapter_config.json").touch()
    model = bert()
    load_adapterhub(model, folder)
    save_adapterhub(model, folder, "a")
    assert sorted(path.name for path in here.iterdir()) == sorted(["a", *kept])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    save_adapterhub(model, folder, "a")
    assert sorted(path.name for path in here.iterdir()) == sorted(["a", *kept[2:]])


KILLED = """
import os, sys
from adapter_ops.integrations.adapterhub import files
from pathlib import Path
real = os.replace
def replace(source, target):
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    calls.append(target)
    real(source, target)
calls, os.replace = [], replace
folder = Path(sys.argv[1])
files._replace(folder, {path.name: path.read_bytes() for path in folder.iterdir()})
"""


def test_a_killed_save_loses_nothing(folder):
    """Wherever a save is killed, the old folder or the new one is there or lies beside, whole; the next save clears."""
    model = bert()
    load_adapterhub(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for renames in (0, 1):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(renames)])
        assert killed.returncode == -9
        assert folder.exists() == (renames == 0)
        for path in folder.parent.iterdir():
            assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        save_adapterhub(model, folder, "a")
        assert [path.name for path in folder.parent.iterdir()] == ["a"]


def two_folders(folder):
    """The files of two folders: the same name and shapes, and all values 0.01 times the config's scale."""
    contents = []
    for scale in (1.0, 2.0):
        model = bert()
        add_adapter(model, "x", AdapterConfig(bottleneck=4, layer_norms="frozen", scale=scale), modules=())
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, 0.01 * scale)
        path = folder.parent / str(scale)
        save_adapterhub(model, path, "x")
        contents.append({file.name: file.read_bytes() for file in path.iterdir()})
    return contents


def assert_whole(model):
    """The config and the weights are of the same one of `two_folders`."""
    scale = list_adapters(model)["x"].config.scale
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, torch.full_like(parameter, 0.01 * scale))


def test_a_reader_never_meets_half_of_two_saves(folder, monkeypatch):
    """Another save takes place before every step of a read in turn."""
    one, two = two_folders(folder)
    target = folder.parent / "target"
    real_stat, real_read = os.stat, Path.read_bytes
    steps = 0

    def after_a_save(real, point):
        def step(path, *args, **kwargs):
            nonlocal steps
            if isinstance(path, Path) and path.parent == target:
                steps += 1
                if steps == point:
                    with monkeypatch.context() as patch:
                        patch.setattr(os, "stat", real_stat)
                        patch.setattr(Path, "read_bytes", real_read)
                        files._replace(target, two)
            return real(path, *args, **kwargs)

        return step

    for point in range(1, 9):
        files._replace(target, one)
        model, steps = bert(), 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", after_a_save(real_stat, point))
            patch.setattr(Path, "read_bytes", after_a_save(real_read, point))
            load_adapterhub(model, target)
        assert steps >= 4
        assert_whole(model)


def test_readers_beside_a_writer(folder):
    contents = two_folders(folder)
    target = folder.parent / "target"
    files._replace(target, contents[0])
    done = threading.Event()

    def save():
        while not done.is_set():
            for content in contents:
                files._replace(target, content)
                time.sleep(0.001)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        for _ in range(40):
            model = bert()
            load_adapterhub(model, target)
            assert_whole(model)
    finally:
        done.set()
        writer.join()


def test_the_moment_between_two_renames(folder, monkeypatch):
    """A save has no folder in its place there, and a reader waits for it."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    monkeypatch.setattr(time, "sleep", lambda seconds: aside.rename(folder))
    load_adapterhub(bert(), folder)
