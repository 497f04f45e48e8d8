from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from clusterpool import config
from clusterpool.config import (
    ClusterRecord,
    NodeConfig,
    NodePaths,
    SessionPaths,
    base_folder,
    checked_socket_path,
    default_object_store_bytes,
    detect_cpus,
    detect_gpus,
    detect_memory_bytes,
    is_alive,
    is_folder_locked,
    make_private_folder,
    read_cluster_record,
    remove_cluster_record,
    user_folders,
    write_cluster_record,
    write_private_file,
)

NODE_ID = "n0123456789"


def node_config(**changes: object) -> NodeConfig:
    values = {"session_folder": "/tmp/x/s-12345678", "node_id": NODE_ID, "cluster_id": "c1", **changes}
    return NodeConfig(**values)  # type: ignore[arg-type]


def test_a_config_survives_json() -> None:
    original = node_config(
        is_head=False,
        is_embedded=True,
        driver_pid=7,
        num_cpus=2.5,
        resources={"licence": 1},
        labels={"zone": "a"},
    )
    assert NodeConfig.from_json(original.to_json()) == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_cpus": -1}, "num_cpus"),
        ({"num_cpus": float("nan")}, "num_cpus"),
        ({"resources": {"licence": -1}}, "licence"),
        ({"node_id": "w123"}, "node_id"),
        ({"node_id": "n../.."}, "node_id"),
        ({"session_folder": "/tmp"}, "session_folder"),
        ({"is_embedded": True}, "driver_pid"),
    ],
)
def test_a_bad_config_is_refused_with_the_field_that_is_wrong(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        node_config(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda fields: fields.pop("node_id"), "node_id"), (lambda fields: fields.update(newer=1), "newer")],
)
def test_a_config_of_another_version_is_refused(change: object, message: str) -> None:
    fields = json.loads(node_config().to_json())
    change(fields)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        NodeConfig.from_json(json.dumps(fields))


def test_the_paths_of_a_node_name_its_node_and_session() -> None:
    paths = node_config().paths
    assert paths.folder == Path("/tmp/x/s-12345678/n-0123456789")
    assert (paths.node_id, paths.session.session_id) == (NODE_ID, "12345678")
    assert paths.process_socket("w0").name == "w0.sock"
    assert paths.arena_file == Path(f"/dev/shm/clusterpool-{os.getuid()}-12345678-{NODE_ID}")


def test_spilled_objects_have_a_folder_of_their_own_wherever_they_go() -> None:
    assert node_config().spill_path == node_config().paths.spill_folder
    elsewhere = node_config(spill_folder="/disk").spill_path
    assert elsewhere == Path("/disk") / node_config().paths.arena_file.name


def test_a_socket_path_has_at_most_107_bytes() -> None:
    longest = Path("/" + "a" * 106)
    assert checked_socket_path(longest) == longest
    with pytest.raises(ValueError, match="CLUSTERPOOL_TMPDIR"):
        checked_socket_path(Path("/" + "a" * 107))
    with pytest.raises(ValueError, match="108 bytes"):
        checked_socket_path(Path("/" + "ä" * 53 + "a"))


class TestBaseFolder:
    @pytest.fixture(autouse=True)
    def no_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CLUSTERPOOL_TMPDIR", raising=False)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    def test_is_tmp_by_default(self) -> None:
        assert base_folder() == Path("/tmp")

    def test_is_the_one_that_was_chosen(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/var/tmp")
        assert base_folder() == Path("/var/tmp")
        monkeypatch.setenv("CLUSTERPOOL_TMPDIR", "/short")
        assert base_folder() == Path("/short")

    def test_is_not_a_runtime_folder_that_the_last_logout_removes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("USER", "nobody-who-lingers")
        monkeypatch.setattr(os, "access", lambda path, mode: True)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/12345")
        assert base_folder() == Path("/tmp")

    def test_falls_back_to_tmp_where_sockets_would_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "a" * 100)
        assert base_folder() == Path("/tmp")
        monkeypatch.setenv("CLUSTERPOOL_TMPDIR", "/" + "a" * 100)
        with pytest.warns(UserWarning, match="CLUSTERPOOL_TMPDIR is too long"):
            assert base_folder() == Path("/tmp")

    def test_the_longest_base_folder_has_room_for_the_longest_socket(self, monkeypatch: pytest.MonkeyPatch) -> None:
        longest = "/" + "a" * (config.SOCKET_PATH_BYTES_MAX - len(config._LONGEST_BELOW_BASE) - 1)
        monkeypatch.setenv("CLUSTERPOOL_TMPDIR", longest)
        session = SessionPaths(base_folder() / f"clusterpool-{os.getuid()}" / "s-12345678")
        assert len(str(session.node("n" + "0" * 10).process_socket("w" + "0" * 12))) == config.SOCKET_PATH_BYTES_MAX


def test_the_users_folder_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "base_folder", lambda: tmp_path / "new")
    folder = config.user_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    assert stat.S_IMODE(config.user_folder().stat().st_mode) == 0o700


def test_only_folders_that_are_there_are_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLUSTERPOOL_TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    ours = tmp_path / f"clusterpool-{os.getuid()}"
    assert ours not in user_folders()
    ours.mkdir()
    assert user_folders()[0] == ours
    assert tmp_path / "missing" not in [folder.parent for folder in user_folders()]


def test_a_folder_that_somebody_else_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    with pytest.raises(PermissionError, match="somebody else"):
        make_private_folder(tmp_path / "theirs")


def test_a_link_to_a_folder_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(PermissionError, match="is no folder but a file or a link; remove it, or set CLUSTERPOOL_HOME"):
        make_private_folder(tmp_path / "link", variable="CLUSTERPOOL_HOME")


def test_a_folder_that_cannot_be_made_names_what_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="set CLUSTERPOOL_HOME to a folder where you may write: .*file/inner"):
        make_private_folder(tmp_path / "file" / "inner", variable="CLUSTERPOOL_HOME")


def test_a_private_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private_file(path, "old")
    write_private_file(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


class TestClusterRecord:
    @pytest.fixture(autouse=True)
    def home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setenv("CLUSTERPOOL_HOME", str(tmp_path / "home"))
        return tmp_path / "home"

    @pytest.fixture
    def record(self, tmp_path: Path) -> ClusterRecord:
        node = NodePaths(tmp_path / "s-12345678" / "n-0123456789")
        node.folder.mkdir(parents=True)
        return ClusterRecord(
            "c1", str(node.session.folder), str(node.folder / "node.sock"), "10.0.0.1:7", "u", None, 1.5
        )

    def test_is_read_as_it_was_written_and_private(self, record: ClusterRecord, home: Path) -> None:
        assert read_cluster_record() is None
        path = write_cluster_record(record)
        assert read_cluster_record() == record
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(home.stat().st_mode) == 0o700

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"cluster_id": 1, "unknown": 2}', "\x00"])
    def test_that_is_damaged_counts_as_none(self, text: str, home: Path) -> None:
        home.mkdir()
        (home / "cluster.json").write_text(text)
        assert read_cluster_record() is None

    def test_of_another_user_counts_as_none(self, record: ClusterRecord, monkeypatch: pytest.MonkeyPatch) -> None:
        write_cluster_record(record)
        monkeypatch.setattr(os, "getuid", lambda: 12345678)
        assert read_cluster_record() is None

    def test_is_removed_only_if_it_is_the_clusters(self, record: ClusterRecord) -> None:
        assert not remove_cluster_record()
        write_cluster_record(record)
        assert not remove_cluster_record("c2")
        assert read_cluster_record() == record
        assert remove_cluster_record("c1")
        assert read_cluster_record() is None

    def test_leads_to_another_node_of_this_host_when_its_own_has_died(self, record: ClusterRecord) -> None:
        write_cluster_record(record)
        other = SessionPaths(Path(record.session_folder)).node("n9876543210")
        other.folder.mkdir(parents=True)
        other.node_socket.touch()
        assert read_cluster_record() == record  # that one is dead too
        descriptor = os.open(other.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            found = read_cluster_record()
            assert found == dataclasses.replace(record, node_socket=str(other.node_socket))
            assert is_alive(found)
        finally:
            os.close(descriptor)
        assert read_cluster_record() == record

    def test_is_alive_while_the_head_holds_its_folder(self, record: ClusterRecord) -> None:
        folder = Path(record.node_socket).parent
        assert not is_alive(record)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            assert is_folder_locked(folder)
            assert not is_alive(record)  # it holds its folder, but does not listen yet
            Path(record.node_socket).touch()
            assert is_alive(record)
        finally:
            os.close(descriptor)
        assert not is_alive(record)
        assert not is_alive(dataclasses.replace(record, node_socket="/nowhere/node.sock"))


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 2),
        # The limit of the cgroup above holds as well.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            3,
        ),
        # A container that sees its own cgroup as the root, under the host's path.
        ({"proc/self/cgroup": "0::/docker/1\n", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n0::/\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000"}, 8),
    ],
)
def test_cpus_are_those_of_the_affinity_and_the_quota(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert detect_cpus(root=write_tree(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 1000 * 1024),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "4096\n"}, 4096),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "8192\n"}, 8192),
        (
            {"proc/self/cgroup": "4:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4096\n"},
            4096,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
            },
            1000 * 1024,
        ),
    ],
)
def test_memory_is_the_machines_or_the_cgroups(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"proc/meminfo": "MemFree: 5 kB\nMemTotal:     1000 kB\n", **files})
    assert detect_memory_bytes(root=tree) == expected


def test_this_machine_has_cpus_and_memory() -> None:
    assert 1 <= detect_cpus() <= (os.cpu_count() or 1)
    assert detect_memory_bytes() > 1 << 20


@pytest.mark.parametrize(
    ("visible", "files", "expected"),
    [
        (None, {}, []),
        (
            None,
            {"proc/driver/nvidia/gpus/0000:01/information": "", "proc/driver/nvidia/gpus/0000:02/i": ""},
            ["0", "1"],
        ),
        (None, {"dev/nvidia0": "", "dev/nvidia7": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""}, ["0", "1"]),
        ("", {"dev/nvidia0": ""}, []),
        ("-1", {"dev/nvidia0": ""}, []),
        ("2, 3", {}, ["2", "3"]),
        ("GPU-8932f937,-1,3", {}, ["GPU-8932f937"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    visible: str | None,
    files: dict[str, str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detect_gpus(root=write_tree(tmp_path, files)) == expected


def test_the_store_takes_its_share_but_never_more_than_is_free(tmp_path: Path) -> None:
    assert default_object_store_bytes(1 << 20, folder=tmp_path) == int((1 << 20) * 0.3) // 4096 * 4096
    status = os.statvfs(tmp_path)
    assert 0 < default_object_store_bytes(1 << 60, folder=tmp_path) <= status.f_bavail * status.f_frsize
    assert default_object_store_bytes(1 << 20, folder=tmp_path / "missing") == 0
