"""Work that one process does while others wait: nothing half done, and no endless wait."""

import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

from scaleup.data import once
from scaleup.data.once import fill_once, is_complete
from scaleup.errors import ConfigError, RunError

FORK = multiprocessing.get_context("fork")


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def write_and_count(counter, seconds=0.0):
    """Return a function that fills a folder slowly and adds its process to a file."""

    def make(part):
        with open(counter, "a") as file:
            file.write(f"{os.getpid()}\n")
        (part / "a.txt").write_text("half")
        time.sleep(seconds)
        (part / "a.txt").write_text("whole")

    return make


def start(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def test_of_several_processes_one_does_the_work_and_nothing_else_is_left(tmp_path):
    folder, counter = tmp_path / "cache" / "key", tmp_path / "count"
    together = [start(fill_once, folder, write_and_count(counter, 0.5)) for _ in range(4)]
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0] * 4
    assert len(counter.read_text().splitlines()) == 1
    assert (folder / "a.txt").read_text() == "whole" and names(folder.parent) == ["key"]


def test_when_the_process_that_works_is_killed_another_one_takes_over(tmp_path):
    folder, counter = tmp_path / "key", tmp_path / "count"
    first = start(fill_once, folder, write_and_count(counter, 60))
    while not counter.exists():
        time.sleep(0.02)
    second = start(fill_once, folder, write_and_count(counter))
    time.sleep(0.3)
    assert second.is_alive() and not folder.exists()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(timeout=20)
    assert second.exitcode == 0 and (folder / "a.txt").read_text() == "whole"
    assert names(tmp_path) == ["count", "key"], "what the first one had written is gone"


def test_a_mistake_in_the_data_reaches_all_that_wait_without_being_looked_for_again(tmp_path):
    folder, counter, told = tmp_path / "key", tmp_path / "count", tmp_path / "told"
    told.mkdir()

    def refuse(part):
        write_and_count(counter, 0.7)(part)
        raise ConfigError(["row 1 is bad", "row 2 is bad"])

    def call(name):
        try:
            fill_once(folder, refuse)
        except ConfigError as error:
            (told / name).write_text(json.dumps(error.problems))

    waiting = [start(call, str(i)) for i in range(3)]
    for process in waiting:
        process.join()
    assert [json.loads((told / n).read_text()) for n in "012"] == [
        ["row 1 is bad", "row 2 is bad"]
    ] * 3
    assert len(counter.read_text().splitlines()) == 1 and not folder.exists()
    # A later attempt looks at the data anew.
    fill_once(folder, write_and_count(counter))
    assert is_complete(folder) and names(tmp_path) == ["count", "key", "told"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def fill(part):
        (part / "a").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(RunError) as caught:
        fill_once(tmp_path / "cache" / "key", fill)
    assert str(caught.value) == (
        f"data.cache_dir: {tmp_path}/cache: No space left on device; free space there, or name a "
        "folder on another disk"
    )
    assert not [name for name in names(tmp_path / "cache") if "part" in name or name == "key"]


def test_a_folder_that_cannot_be_made_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data.cache_dir: .*file: .*; name a folder that can be"):
        fill_once(tmp_path / "file" / "key", lambda part: None)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_folder_that_lost_a_file_is_made_again(tmp_path, damage):
    folder, counter = tmp_path / "key", tmp_path / "count"
    make = write_and_count(counter)
    fill_once(folder, make)
    fill_once(folder, make)
    assert len(counter.read_text().splitlines()) == 1
    (folder / "a.txt").unlink() if damage == "missing" else (folder / "a.txt").write_text("w")
    fill_once(folder, make)
    assert (folder / "a.txt").read_text() == "whole" and names(tmp_path) == ["count", "key"]


def test_an_interrupted_process_leaves_nothing(tmp_path):
    def interrupt(part):
        (part / "a").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_once(tmp_path / "key", interrupt)
    assert names(tmp_path) == []


def test_a_lease_of_a_lost_host_ends(tmp_path, monkeypatch):
    """A lock whose holder is on another host and is silent is taken over after the lease."""
    monkeypatch.setattr(once, "LEASE_S", 1.0)
    folder, counter = tmp_path / "key", tmp_path / "count"
    holder = start(fill_once, folder, write_and_count(counter, 60))
    while not counter.exists():
        time.sleep(0.02)
    os.kill(holder.pid, signal.SIGSTOP)  # alive, but it renews nothing
    try:
        begin = time.monotonic()
        fill_once(folder, write_and_count(counter))
        assert 0.5 < time.monotonic() - begin < 20
        assert (folder / "a.txt").read_text() == "whole"
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
