"""`init(runtime_env=...)`: what is packed, what workers see of it, and what happens when it cannot be had."""

from __future__ import annotations

import importlib
import io
import os
import platform
import random
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import config, ids
from clusterpool.client import bootstrap
from clusterpool.client import connections as connections_module
from clusterpool.client.packages import pack, prepare
from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.joining import RegistrationRefused
from clusterpool.errors import VersionMismatch, WorkerSetupFailed
from clusterpool.processes.launch import launch_node
from clusterpool.transport import stream

OTHER_PATCH = ".".join(platform.python_version_tuple()[:2]) + ".99"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder as users have them: a module, a package, a file of values, and what nobody wants to send."""
    folder = tmp_path / "project"
    (folder / "inner").mkdir(parents=True)
    (folder / "rt_module.py").write_text("NUMBER = 41\n")
    (folder / "inner" / "values.txt").write_text("1 2 3")
    (folder / ".git").mkdir()
    (folder / ".git" / "history").write_text("x" * 1000)
    (folder / "inner" / "__pycache__").mkdir()
    (folder / "inner" / "__pycache__" / "old.pyc").write_text("x")
    return folder


# --- checking and packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime_env", "error", "text"),
    [
        ({"pip": ["numpy"]}, ValueError, "unknown keys: 'pip'; there are: env_vars, py_modules, working_dir"),
        (["working_dir"], TypeError, "must be a dict"),
        ({"working_dir": "/nowhere/at/all"}, ValueError, "must be a folder that exists: /nowhere/at/all"),
        ({"working_dir": 3}, TypeError, "takes paths, not int"),
        ({"py_modules": "a/path"}, TypeError, "must be a list of paths"),
        ({"py_modules": ["/nowhere/at/all"]}, ValueError, "a package's folder or a .py file"),
        ({"env_vars": {"A": 1}}, TypeError, "must map strings to strings: 'A': 1"),
        ({"env_vars": {"A=B": "1"}}, ValueError, "no environment variable can be"),
        ({"env_vars": ["A"]}, TypeError, "must be a dict of strings"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(runtime_env: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        clusterpool.init(runtime_env=runtime_env)
    assert not clusterpool.is_initialized()


def test_a_module_must_have_a_name_that_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "my-package").mkdir()
    with pytest.raises(ValueError, match=r"nothing can be imported under this name: .*/my-package"):
        prepare({"py_modules": [tmp_path / "my-package"]})


def test_a_function_may_set_variables_only() -> None:
    with pytest.raises(ValueError, match=r"are for the whole job: clusterpool.init"):
        clusterpool.remote(runtime_env={"working_dir": "."})(len)
    with pytest.raises(TypeError, match="strings to strings"):
        clusterpool.remote(runtime_env={"env_vars": {"A": 1}})(len)


def test_an_empty_environment_is_none() -> None:
    assert prepare(None) == prepare({}) == prepare({"env_vars": {}, "py_modules": []}) == ("", [])


def test_the_same_files_give_the_same_package(project: Path, tmp_path: Path) -> None:
    first = pack(project, "")
    copy = tmp_path / "copy"
    (copy / "inner").mkdir(parents=True)
    (copy / "inner" / "values.txt").write_text("1 2 3")
    (copy / "rt_module.py").write_text("NUMBER = 41\n")
    os.utime(copy / "rt_module.py", (0, 0))
    assert pack(copy, "").digest == first.digest, "histories and byte code are left out, times do not count"
    (copy / "rt_module.py").write_text("NUMBER = 42\n")
    assert pack(copy, "").digest != first.digest


def test_what_does_not_shrink_is_not_compressed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words and more words " * 10_000)
    (tmp_path / "image.bin").write_bytes(random.Random(1).randbytes(200_000))
    package = pack(tmp_path, "")
    with zipfile.ZipFile(io.BytesIO(package.content)) as archive:
        kinds = {entry.filename: entry.compress_type for entry in archive.infolist()}
        assert archive.read("image.bin") == (tmp_path / "image.bin").read_bytes()
    assert kinds == {"text.txt": zipfile.ZIP_DEFLATED, "image.bin": zipfile.ZIP_STORED}


def test_the_folder_of_the_variable_goes_along_unless_another_is_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTERPOOL_WORKING_DIR", str(project))
    named = prepare({"working_dir": project})
    assert prepare(None) == named
    assert prepare({"env_vars": {"A": "1"}}).packages == named.packages
    assert prepare({"working_dir": None}) == ("", [])


def test_a_link_to_a_folder_above_ends_somewhere(project: Path) -> None:
    before = pack(project, "").digest
    (project / "inner" / "loop").symlink_to(project)
    (project / "nothing").symlink_to(project / "gone")
    assert pack(project, "").digest == before


def test_a_folder_that_is_too_large_is_named_with_its_largest_files(project: Path) -> None:
    (project / "inner" / "table.bin").write_bytes(bytes(2_000_000))
    with pytest.raises(ValueError) as caught:
        prepare({"working_dir": project}, bytes_max=1_000_000)
    text = str(caught.value)
    assert str(project) in text and "2 MB in 3 files, at most 1 MB" in text
    assert "project/inner/table.bin (2.0 MB)" in text


# --- in workers ---------------------------------------------------------------------------------------------


def look() -> tuple[str, str, str, int]:
    import rt_module  # type: ignore[import-not-found]

    return os.getcwd(), Path("inner/values.txt").read_text(), rt_module.__file__, rt_module.NUMBER


def test_workers_run_in_a_copy_of_the_working_folder(fresh: None, project: Path) -> None:
    clusterpool.init(num_cpus=2, runtime_env={"working_dir": project})
    with clusterpool.Pool(2) as pool:
        folder, values, module, number = pool.apply(look)
    assert (values, number) == ("1 2 3", 41)
    assert module == f"{folder}/rt_module.py"
    assert not Path(folder).is_relative_to(project) and folder != os.getcwd()
    remote = clusterpool.remote(look)
    assert clusterpool.get(remote.remote())[0] == folder, "tasks and pools of a job have the same"


def import_named(name: str) -> tuple[str, int]:
    module = importlib.import_module(name)
    return str(module.__file__), module.NUMBER


def test_modules_come_before_those_of_the_driver(
    fresh: None, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "rt_package"
    package.mkdir()
    (package / "__init__.py").write_text("from rt_package.below import NUMBER\n")
    (package / "below.py").write_text("NUMBER = 7\n")
    other = tmp_path / "drivers"
    other.mkdir()
    (other / "rt_module.py").write_text("NUMBER = 1\n")
    monkeypatch.syspath_prepend(other)
    clusterpool.init(num_cpus=2, runtime_env={"py_modules": [package, str(project / "rt_module.py")]})
    with clusterpool.Pool(1) as pool:
        assert pool.apply(import_named, ("rt_package",))[1] == 7
        assert pool.apply(import_named, ("rt_module",))[1] == 41
        assert pool.apply(os.getcwd) == os.getcwd(), "without a working_dir, the driver's folder is used"


def variable(name: str) -> str | None:
    return os.environ.get(name)


def nested() -> str | None:
    with clusterpool.Pool(1) as pool:
        return pool.apply(variable, ("RT_JOB",))


def test_variables_are_set_in_workers_alone(fresh: None) -> None:
    clusterpool.init(num_cpus=2, runtime_env={"env_vars": {"RT_JOB": "yes"}})
    remote = clusterpool.remote(variable)
    with_own = remote.options(runtime_env={"env_vars": {"RT_TASK": "1", "RT_JOB": "own"}})
    assert clusterpool.get([with_own.remote("RT_TASK"), with_own.remote("RT_JOB")]) == ["1", "own"]
    assert clusterpool.get([remote.remote("RT_TASK"), remote.remote("RT_JOB")]) == [None, "yes"]
    assert clusterpool.get(clusterpool.remote(nested).remote()) == "yes", "and in what tasks start"
    assert "RT_JOB" not in os.environ


def test_a_worker_with_variables_of_its_own_is_not_reused_without_them(fresh: None) -> None:
    clusterpool.init(num_cpus=1)
    remote = clusterpool.remote(variable)
    with_own = remote.options(runtime_env={"env_vars": {"RT_TASK": "1"}})
    assert clusterpool.get(with_own.remote("RT_TASK")) == "1"
    # With one CPU the lease of the first must come back before the second is granted.
    assert clusterpool.get(remote.remote("RT_TASK")) is None


def test_a_package_that_cannot_be_had_fails_the_tasks_with_its_reason(
    fresh: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "upload", lambda client, packages: None)
    clusterpool.init(num_cpus=2, runtime_env={"working_dir": project})
    started_s = time.monotonic()
    with pytest.raises(WorkerSetupFailed, match="could not be unpacked on this node: the control store does"):
        clusterpool.get(clusterpool.remote(look).remote(), timeout=20)
    with clusterpool.Pool(2) as pool, pytest.raises(WorkerSetupFailed, match="could not be unpacked"):
        pool.apply_async(look).get(20)
    assert time.monotonic() - started_s < 30


# --- a cluster that outlives its jobs -----------------------------------------------------------------------


@pytest.fixture
def node() -> Iterator[config.NodePaths]:
    """A node that does not end with its driver."""
    session = config.SessionPaths.in_base(ids.new_session_id())
    process = launch_node(
        config.NodeConfig(
            session_folder=str(session.folder),
            node_id=ids.new_node_id(),
            cluster_id=session.session_id,
            num_cpus=2,
            object_store_bytes=16 << 20,
        )
    )
    process.wait_ready()
    yield process.paths
    clusterpool.shutdown()
    process.terminate()


def test_a_later_job_finds_what_an_earlier_one_brought(node: config.NodePaths, project: Path) -> None:
    folders = []
    for _ in range(2):
        clusterpool.init(str(node.node_socket), runtime_env={"working_dir": project})
        with clusterpool.Pool(1) as pool:
            folders.append(pool.apply(look)[0])
        clusterpool.shutdown()
    assert folders[0] == folders[1]
    assert [path.name for path in (node.folder / "packages").iterdir()] == [Path(folders[0]).name]
    log = node.node_log.read_text()
    assert log.count("went to the control store") == 1, log


def write_into(name: str, text: str) -> str:
    Path("new.txt").write_text("new")
    before = Path(name).read_text()
    Path(name).write_text(text)
    return before


def test_what_a_job_writes_into_its_copy_the_next_does_not_see(node: config.NodePaths, project: Path) -> None:
    for _ in range(2):
        clusterpool.init(str(node.node_socket), runtime_env={"working_dir": project})
        with clusterpool.Pool(1) as pool:
            assert not pool.apply(os.path.exists, ("new.txt",))
            assert pool.apply(write_into, ("inner/values.txt", "spoilt")) == "1 2 3"
        with clusterpool.Pool(1) as pool:
            assert pool.apply(write_into, ("inner/values.txt", "once more")) == "spoilt", "within the job it is there"
        clusterpool.shutdown()


# --- versions -----------------------------------------------------------------------------------------------


def test_a_driver_with_another_python_is_told_so_at_once(
    node: config.NodePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections_module.platform, "python_version", lambda: "3.7.2")  # type: ignore[attr-defined]
    started_s = time.monotonic()
    with pytest.raises(VersionMismatch) as caught:
        clusterpool.init(str(node.node_socket))
    assert time.monotonic() - started_s < 20
    text = str(caught.value)
    monkeypatch.undo()
    assert "Python 3.7.2" in text and f"Python {platform.python_version()}" in text
    assert node.node_id in text
    assert not clusterpool.is_initialized()
    assert list(node.process_sockets_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("protocol", "python", "version", "is_refused"),
    [
        (m.PROTOCOL_VERSION, platform.python_version(), clusterpool.__version__, False),
        (m.PROTOCOL_VERSION, OTHER_PATCH, clusterpool.__version__, False),
        (m.PROTOCOL_VERSION, "3.7.2", clusterpool.__version__, True),
        (m.PROTOCOL_VERSION, platform.python_version(), "0.0.1", True),
        (m.PROTOCOL_VERSION + 1, platform.python_version(), clusterpool.__version__, True),
    ],
)
def test_the_node_itself_refuses_other_versions(
    node: config.NodePaths, protocol: int, python: str, version: str, is_refused: bool
) -> None:
    connection = stream.connect(node.node_socket)
    try:
        address = m.Address(node.node_id, "d000000000000")
        connection.send(m.Hello(protocol, address, "tool", os.getpid(), "", python, version))
        connection.send(m.RegisterProcess(None))
        answers: list[Any] = []
        deadline_s = time.monotonic() + 30
        while len(answers) < 2 and time.monotonic() < deadline_s:
            frames, ended = connection.receive()
            answers += map(wire.decode, frames)
            if ended:
                break
            time.sleep(0.001)
    finally:
        connection.close()
    assert isinstance(answers[0], m.Hello)
    assert isinstance(answers[1], RegistrationRefused if is_refused else m.Registered), answers


# --- without any environment --------------------------------------------------------------------------------


def run_script(folder: Path, cwd: Path, source: str) -> str:
    script = folder / "program.py"
    script.write_text(textwrap.dedent(source))
    outcome = subprocess.run(
        [sys.executable, str(script)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_modules_beside_the_script_are_there_without_any_environment(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "scripts", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "rt_helper.py").write_text(
        "from rt_other import FACTOR\ndef scaled(x):\n    return x * FACTOR\nclass Thing:\n    pass\n"
    )
    (folder / "rt_other.py").write_text("FACTOR = 3\n")
    (elsewhere / "here.txt").write_text("found")
    program = """
        import os
        import rt_helper
        from clusterpool import Executor, Pool

        def late(_):
            import rt_other
            return rt_other.FACTOR, open("here.txt").read()

        with Pool(2) as pool:
            print(pool.map(rt_helper.scaled, [1, 2]), pool.apply(late, (0,)))
            print(isinstance(pool.apply(rt_helper.Thing), rt_helper.Thing))
        with Executor(1) as executor:
            print(executor.submit(rt_helper.scaled, 5).result())
    """
    assert run_script(folder, elsewhere, program) == "[3, 6] (3, 'found')\nTrue\n15\n"


def test_a_module_that_workers_lack_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "rt_hidden.py").write_text("def f():\n    return 1\n")
    program = f"""
        import sys, time
        import clusterpool
        from clusterpool import Executor, Pool

        clusterpool.init(num_cpus=2)
        pool, executor = Pool(2), Executor(1)
        assert executor.submit(abs, -1).result(20) == pool.apply(abs, (-1,)) == 1
        sys.path.insert(0, {str(hidden)!r})  # too late for the workers
        import rt_hidden

        started_s = time.monotonic()
        def check(call):
            try:
                print(call())
            except clusterpool.errors.VersionMismatch as exc:
                text = str(exc)
                node_id = clusterpool.nodes()[0]["node_id"]
                print("rt_hidden" in text, node_id in text, sys.version.split()[0] in text)

        with pool:
            check(lambda: pool.apply(rt_hidden.f))
            check(lambda: pool.apply_async(len, (rt_hidden.f,)).get(20))
            print(pool.apply(abs, (-1,)))
        with executor:
            check(lambda: executor.submit(rt_hidden.f).result(20))
        check(lambda: clusterpool.get(clusterpool.remote(rt_hidden.f).remote(), timeout=20))
        print(time.monotonic() - started_s < 30)
    """
    said = run_script(folder, tmp_path, program)
    assert said == "True True True\nTrue True True\n1\nTrue True True\nTrue True True\nTrue\n"
