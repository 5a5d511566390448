"""Folders are replaced in one step: whatever happens in between, the old one is whole."""

import contextlib
import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from keras_gemma2 import folder_swap, staging
from keras_gemma2.errors import CheckpointError
from keras_gemma2.staging import TOKENIZER_FILES, replacing_folder

pytestmark = pytest.mark.backend_free
NAMES = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "assets/tokenizer/vocabulary.spm")


def write(folder, version, names=NAMES):
    """A checkpoint whose files all hold the same words, many of them."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{version} " * 2000)


def versions(folder, names=NAMES):
    """What the files hold; a torn file or a mixture gives more than one."""
    return {word for name in names for word in Path(folder, name).read_text().split()} | {
        len(Path(folder, name).read_text().split()) for name in names
    }


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def replace(target, version="new", names=NAMES, **options):
    with replacing_folder(target, **options) as folder:
        assert os.listdir(folder) == []
        write(folder, version, names)


def test_a_new_folder_and_its_parents_are_made_with_the_usual_modes(tmp_path):
    before = os.umask(0o022)
    try:
        replace(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert versions(tmp_path / "a" / "b") == {"new", 2000} and os.listdir(tmp_path / "a") == ["b"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a" / "b").rglob("*") if p.is_file()}
    assert modes == {0o644} and stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755


@pytest.mark.parametrize("exchange", [True, False])
def test_stale_files_go_and_the_users_own_stay(tmp_path, monkeypatch, exchange):
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr(folder_swap, "_exchange", lambda *_: False)
    target = tmp_path / "model"
    write(target, "old", [*NAMES, "model.safetensors.index.json", "tokenizer.model", "model_00000.weights.h5"])
    mine = {"README.md": b"mine", "logs/events.out": b"log", "notes/model.safetensors": b"deep", "tokenizer.model.bak": b"b"}
    for name, content in mine.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
    (target / "empty").mkdir()
    (target / "link").symlink_to("README.md")
    with open(target / "logs/events.out", "ab") as log:  # an open log goes on in the new folder
        replace(target, names=NAMES[:2])
        log.write(b" more")
    after = snapshot(target)
    assert after.pop("link") == b"mine" and os.readlink(target / "link") == "README.md"
    assert after.pop("logs/events.out") == b"log more" and (target / "empty").is_dir()
    assert set(after) == {*NAMES[:2], "README.md", "notes/model.safetensors", "tokenizer.model.bak"}
    assert versions(target, NAMES[:2]) == {"new", 2000} and os.listdir(tmp_path) == ["model"]


def test_no_file_that_no_writer_names_is_dropped(tmp_path):
    """What people, trainers and PEFT put beside a checkpoint."""
    mine = [
        *("epoch_03.weights.h5", "my.weights.h5", "model_final.weights.h5", "my.weights.json", "task.weights.h5"),
        *("adapter_model.safetensors", "optimizer.safetensors", "model-best.safetensors", "model-first-of-three.safetensors"),
        *("adapter_model.safetensors.index.json", "pytorch_model_fsdp.bin", "pytorch_model-old.bin", "Model.safetensors"),
    ]
    written = [
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.weights.h5"),
        *("model_00000.weights.h5", "model.weights.json", "pytorch_model.bin", "pytorch_model-00002-of-00002.bin"),
        *("pytorch_model.bin.index.json", "config.json", "task.json", "metadata.json", "generation_config.json"),
    ]
    write(tmp_path / "model", "old", [*mine, *written])
    replace(tmp_path / "model", names=["config.json"], owned=staging.MODEL_FILES)
    assert set(snapshot(tmp_path / "model")) == {*mine, "config.json"}
    assert versions(tmp_path / "model", mine) == {"old", 2000} and versions(tmp_path / "model", ["config.json"]) == {"new", 2000}


def test_only_owned_files_are_dropped(tmp_path):
    """A tokenizer saved into a model's folder leaves the model there."""
    write(tmp_path / "model", "old", ["model.safetensors", "tokenizer.model", "tokenizer.json"])
    replace(tmp_path / "model", names=["tokenizer.json"], owned=TOKENIZER_FILES)
    assert set(snapshot(tmp_path / "model")) == {"model.safetensors", "tokenizer.json"}


def test_a_save_within_a_save_writes_to_the_same_folder(tmp_path):
    with replacing_folder(tmp_path / "model") as outer:
        write(outer, "outer", ["task.json"])
        with replacing_folder(outer) as inner:
            write(inner, "inner", ["config.json"])
    assert set(snapshot(tmp_path / "model")) == {"task.json", "config.json"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CheckpointError])
def test_an_error_leaves_everything_as_it_was(tmp_path, error):
    write(tmp_path / "model", "old")
    before = snapshot(tmp_path)
    for target in (tmp_path / "model", tmp_path / "not" / "yet"):
        with pytest.raises(error), replacing_folder(target) as folder:
            write(folder, "new", NAMES[:2])
            raise error("stopped")
    assert snapshot(tmp_path) == before and os.listdir(tmp_path) == ["model"]


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "real" and versions(tmp_path / "real") == {"new", 2000}
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "model").write_text("mine")
    cases = {"model": "model' is a file; a checkpoint is a folder"}
    cases |= {name: f"model' is a file, so .*{name}' below it" for name in ("model/below", "model/far/below")}
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message), replacing_folder(tmp_path / name):
            raise AssertionError
    assert (tmp_path / "model").read_text() == "mine" and os.listdir(tmp_path) == ["model"]


def test_links_that_lead_to_themselves_are_named(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name in ("a", "a/below"):
        with (
            pytest.raises(CheckpointError, match="/[ab]' is a symbolic link that leads back to itself"),
            replacing_folder(tmp_path / name),
        ):
            raise AssertionError
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    replace("~/model")
    replace(Path("~/other"))
    assert os.listdir(tmp_path) == ["home"] and sorted(os.listdir(tmp_path / "home")) == ["model", "other"]


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("", CheckpointError, "`target` must be the path of a folder"),
        ("a\0b", CheckpointError, "`target` has a character that no path can have"),
        ("a\ud800", CheckpointError, "`target` has a character that no path can have"),
        (3, TypeError, "`target` must be .*Received: 3"),
        (None, TypeError, "`target` must be .*Received: None"),
        (b"folder", TypeError, "`target` must be .*Received: b'folder'"),
    ],
)
def test_what_is_no_path_is_refused(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message), replacing_folder(path):
        raise AssertionError
    assert os.listdir(tmp_path) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"full: this save needs 1000000.00 GB and .* GB are free") as caught:
        replace(tmp_path / "model", needed_bytes=10**15)
    assert str(tmp_path / "model") in str(caught.value) and os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_fills_up_gives_the_same_message(tmp_path):
    write(tmp_path / "model", "old")
    before = snapshot(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"model' is full: this save needs 0.00 GB. Free some"),
        replacing_folder(tmp_path / "model", needed_bytes=1000),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
        file.flush()
    assert snapshot(tmp_path) == before


@contextlib.contextmanager
def unprivileged():
    """As a user who may not write everywhere, and a folder that he can reach."""
    folder = tempfile.mkdtemp(prefix="gemma2-staging-")
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    os.chown(folder, user, -1)
    before = os.geteuid()
    os.seteuid(user)
    try:
        yield Path(folder)
    finally:
        os.seteuid(before)
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)


def test_no_permission_is_an_error_that_names_the_folder():
    with unprivileged() as parent:
        write(parent / "model", "old")
        os.chmod(parent / "model", 0o555)
        os.chmod(parent, 0o555)
        for target in (parent / "new", parent / "model"):
            with pytest.raises(CheckpointError, match=f"{target}' cannot be written: .*Permission denied.*Choose another"):
                replace(target)
        assert versions(parent / "model") == {"old", 2000}
        os.chmod(parent / "model", 0o755)


@pytest.mark.parametrize("case", ["current", "parent read-only", "mount point", "busy"])
def test_folders_that_cannot_be_renamed_are_changed_file_by_file(monkeypatch, case):
    with unprivileged() as parent:
        target = parent / "model"
        write(target, "old", [*NAMES, "tokenizer.model"])
        (target / "README.md").write_text("mine")
        if case == "current":
            monkeypatch.chdir(target)
        elif case == "parent read-only":
            os.chmod(parent, 0o555)
        elif case == "mount point":  # mounting needs rights that tests do not have
            monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(target))
        else:

            def busy(*_):
                raise OSError(errno.EBUSY, "Device or resource busy")

            monkeypatch.setattr(folder_swap, "_exchange", busy)
        inode, order, move = target.stat().st_ino, [], os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), move(a, b)))
        replace("." if case == "current" else target, names=NAMES[:3])
        assert target.stat().st_ino == inode and order[-1] == "config.json"
        assert set(snapshot(target)) == {*NAMES[:3], "README.md"} and versions(target, NAMES[:3]) == {"new", 2000}
        assert os.listdir(parent) == ["model"]
        monkeypatch.chdir("/")


def test_an_export_moved_file_by_file_gets_its_graph_last(tmp_path, monkeypatch):
    """Whoever watches a folder loads it as soon as the graph is there."""
    names = ("saved_model.pb", *(f"variables.data-{i}" for i in range(20)))
    write(tmp_path / "model", "old", names)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "model"))
    order, move = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), move(a, b)))
    replace(tmp_path / "model", names=names)
    assert order[-1] == "saved_model.pb" and set(order[-21:]) == set(names)
    assert versions(tmp_path / "model", names) == {"new", 2000}


def test_leftovers_of_dead_processes_are_removed_and_those_of_the_living_kept(tmp_path):
    target = tmp_path / "model"
    dead, unlike = tmp_path / ".model.saving-0123abcd", tmp_path / ".model.saving-of-mine"
    write(dead, "half")
    unlike.mkdir()
    with replacing_folder(target) as living:  # its lock is held
        write(living, "slow")
        replace(target, "quick")
        assert versions(living) == {"slow", 2000} and not dead.exists()
    assert versions(target) == {"slow", 2000} and sorted(os.listdir(tmp_path)) == [unlike.name, "model"]


def test_a_folder_renamed_by_a_killed_process_is_put_back(tmp_path):
    """Between the two renames of a system without exchange, the old folder is whole under a hidden name."""
    write(tmp_path / ".model.saving-0123abcd-old", "old")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "model"):
        raise RuntimeError
    assert versions(tmp_path / "model") == {"old", 2000} and os.listdir(tmp_path) == ["model"]


LOOP = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from keras_gemma2.staging import replacing_folder

version = 0
while True:
    version += 1
    with replacing_folder(sys.argv[1]) as folder:
        for name in {NAMES!r}:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{{version}} " * 2000)
    print(version, flush=True)
"""


def test_killed_at_any_moment_the_target_is_whole(tmp_path):
    target, draw, replaced = tmp_path / "model", random.Random(5), 0
    write(target, "0")
    (target / "README.md").write_text("mine")
    for _ in range(25):
        saver = subprocess.Popen([sys.executable, "-c", LOOP, str(target)], stdout=subprocess.PIPE)
        saver.stdout.readline()  # it is in the loop now
        time.sleep(draw.uniform(0, 0.03))
        saver.send_signal(signal.SIGKILL)
        saver.communicate()
        found = versions(target)
        assert len(found) == 2 and 2000 in found, found
        assert (target / "README.md").read_text() == "mine"
        replaced += "0" not in found
        hidden = [name for name in os.listdir(tmp_path) if name != "model"]
        assert all(name.startswith(".model.saving-") for name in hidden) and len(hidden) <= 1, "the last save removed the others"
    assert replaced == 25
    replace(target)
    assert os.listdir(tmp_path) == ["model"]
