"""What memory may be taken: made-up trees of control groups, the kernel's own, and a limit on address space."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.system import control_groups, memory
from mpq_deploy.system.memory import (
    VARIABLE,
    Machine,
    Room,
    children_peak_bytes,
    held_memory,
    machine_memory,
    memory_room,
    metered,
    peak_rss_bytes,
)

GB = 10**9
CHILD = "from mpq_deploy.system.memory import memory_room; room = memory_room(); print(room.bytes, room.whose)"


class Tree:
    """A made-up root of a file system with the kernel's files about memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def second(self, group: str = "/", mounted: str = "/") -> None:
        """Be in ``group`` of the second version, of which ``mounted`` is what is seen at /sys/fs/cgroup."""
        self.write("proc/self/cgroup", f"0::{group}\n")
        self.write(
            "proc/self/mountinfo", f"30 24 0:26 {mounted} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
        )

    def group(self, path: str, used: int, inactive: int = 0, **limits: int) -> None:
        folder = f"sys/fs/cgroup/{path}".rstrip("/")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(
            f"{folder}/memory.stat", f"anon {used}\ninactive_file {inactive}\nactive_file 7\n"
        )
        for name in ("max", "high"):
            self.write(f"{folder}/memory.{name}", f"{limits.get(name, 'max')}\n")


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(memory, "machine_memory", lambda: Machine(99 * GB, 64 * GB))
    return Tree(tmp_path / "root")


def test_without_groups_the_machine_bounds(tree: Tree) -> None:
    assert memory_room(tree.root) == Room(64 * GB, "this machine")


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_psutil", lambda: None)
    for module in memory, control_groups:
        monkeypatch.setattr(module, "kernel_text", lambda path: "")
    assert memory_room(tmp_path) is None and machine_memory() is None and held_memory() == 0


def test_a_device_without_psutil_reads_the_same_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not Path("/proc/meminfo").is_file():
        pytest.skip("only Linux says it in a file")
    expected = machine_memory()
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = machine_memory()
    assert found and expected and found.total == expected.total
    assert found.available == pytest.approx(expected.available, rel=0.1)


def test_the_peak_is_that_of_the_block() -> None:
    with metered() as first:
        assert len(bytearray(b"x" * (64 << 20)))
    with metered() as second:
        pass
    assert first.peak_rss_bytes >= peak_rss_bytes() > 10 << 20
    assert second.peak_rss_bytes > 10 << 20 and second.seconds >= 0


def test_a_large_child_counts() -> None:
    with metered() as reading:
        subprocess.run([sys.executable, "-c", f"b'x' * ({GB // 2})"], check=True)
    assert reading.peak_rss_bytes > GB // 2 or not children_peak_bytes()


def test_a_container_sees_its_own_group_as_the_top(tree: Tree) -> None:
    tree.second("/")
    tree.group("", used=3 * GB, max=4 * GB)
    assert memory_room(tree.root) == Room(1 * GB, "the control group /")


def test_the_cache_of_files_counts_as_free(tree: Tree) -> None:
    tree.second("/app")
    tree.group("app", used=3 * GB, inactive=2 * GB, max=4 * GB)
    assert memory_room(tree.root).bytes == 3 * GB


def test_the_lower_limit_counts(tree: Tree) -> None:
    tree.second("/app")
    tree.group("app", used=GB, max=8 * GB, high=2 * GB)
    assert memory_room(tree.root).bytes == GB


def test_a_group_above_may_be_the_tightest(tree: Tree) -> None:
    tree.second("/user.slice/job/step")
    tree.group("user.slice/job/step", used=GB, max=9 * GB)
    tree.group("user.slice/job", used=2 * GB)
    tree.group("user.slice", used=5 * GB, max=6 * GB)
    assert memory_room(tree.root) == Room(GB, "the control group /user.slice")


def test_no_limit_and_a_group_over_its_limit(tree: Tree) -> None:
    tree.second("/app")
    tree.group("app", used=3 * GB)
    assert memory_room(tree.root) == Room(64 * GB, "this machine")
    tree.group("app", used=3 * GB, high=2 * GB)
    assert memory_room(tree.root).bytes == 0


@pytest.mark.parametrize(
    ("group", "mounted"), [("/docker/1f", "/docker/1f"), ("/../other", "/docker/1f")]
)
def test_a_group_that_is_named_from_outside(tree: Tree, group: str, mounted: str) -> None:
    """Where only part of the groups is mounted, paths are relative to it, or lie outside of it."""
    tree.second(group, mounted)
    tree.group("", used=GB, max=2 * GB)
    assert memory_room(tree.root).bytes == GB


def first_version(tree: Tree, limit: int) -> None:
    tree.write("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/job\n1:name=systemd:/\n0::/\n")
    mounts = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    mounts += "32 30 0:28 / /sys/fs/cgroup/my\\040memory rw shared:9 - cgroup cgroup rw,memory\n"
    tree.write("proc/self/mountinfo", mounts)
    folder = "sys/fs/cgroup/my memory/job"
    tree.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
    tree.write(f"{folder}/memory.usage_in_bytes", f"{3 * GB}\n")
    tree.write(f"{folder}/memory.stat", f"inactive_file 1\ntotal_inactive_file {GB}\n")


def test_the_first_version(tree: Tree) -> None:
    first_version(tree, 4 * GB)
    assert memory_room(tree.root) == Room(2 * GB, "the control group /job")
    first_version(tree, 0x7FFFFFFFFFFFF000)
    assert memory_room(tree.root) == Room(64 * GB, "this machine")


def test_the_variable_goes_first(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    amounts = {"12GB": 12 * GB, "1.5 g": 3 * GB // 2, "512MiB": 512 << 20, "1000": 1000}
    for text, expected in amounts.items():
        monkeypatch.setenv(VARIABLE, text)
        assert memory_room(tree.root).bytes == expected
    monkeypatch.setenv(VARIABLE, "plenty")
    with pytest.raises(UsageError, match="'plenty' in MPQ_DEPLOY_MEMORY"):
        memory_room(tree.root)


def child(before: str = "") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{CHILD}"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    size, _, whose = done.stdout.strip().partition(" ")
    return int(size), whose


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux says what a process has mapped"
)
def test_a_limit_on_address_space() -> None:
    limit = GB // 2
    size, whose = child(
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))"
    )
    assert 0 < size < limit and "ulimit -v" in whose
    assert (
        resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
        or memory_room() is not None
    )


def test_a_group_of_the_kernel() -> None:
    """A real limit, where this process may make a control group."""
    first = Path("/sys/fs/cgroup/memory")
    parent, limit = (
        (first, "memory.limit_in_bytes") if first.is_dir() else (first.parent, "memory.max")
    )
    if not (parent / "cgroup.procs").is_file() or not os.access(parent, os.W_OK):
        pytest.skip("this process may make no control group")
    group = parent / f"mpq-deploy-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    try:
        if not (group / limit).is_file():
            pytest.skip("the control groups here do not limit memory")
        (group / limit).write_text(str(200 << 20), encoding="utf-8")
        size, whose = child(
            f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        )
        assert 100 << 20 < size <= 200 << 20
        assert group.name in whose
    finally:
        group.rmdir()


def test_what_this_process_holds_grows_with_it() -> None:
    before = held_memory()
    kept = bytearray(b"x" * (64 << 20))
    assert held_memory() - before > 48 << 20
    assert len(kept) and memory.MACHINE in str(Room(GB, memory.MACHINE))


HOLES = """
import resource, numpy as np
from mpq_deploy.system import control_groups, memory
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
memory.{call}
before = memory.memory_room().bytes
# Freed but for one in thirty, which lie all over the heap.
kept = [np.ones(1 << 20) for _ in range(90)]
kept = kept[::30]
print((before - memory.memory_room().bytes) >> 20)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="address space is limited on Linux"
)
def test_freed_arrays_leave_limited_address_space() -> None:
    """With holes in a heap that never shrinks nearly all of it would stay taken."""

    def taken(call: str) -> int:
        code = [sys.executable, "-c", HOLES.format(call=call)]
        return int(subprocess.run(code, capture_output=True, text=True, check=True).stdout)

    assert taken("spare_address_space()") < 40
    assert taken("memory_room()") >= taken("spare_address_space()")
