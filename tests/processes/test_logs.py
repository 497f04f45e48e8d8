from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterpool.processes.logs import LogPipe, WorkerLog, prune_logs


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    for descriptor in (read_end, write_end):
        try:
            os.close(descriptor)
        except OSError:
            pass  # the test closed it


def texts(lines: list[object]) -> list[str]:
    return [line.text for line in lines]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("writes", "expected", "rest"),
    [
        ([b"one\ntwo\n"], ["one", "two"], []),
        ([b"on", b"e\ntw", b"o"], ["one"], ["two"]),
        ([b"\n\n"], ["", ""], []),
        ([b"dos\r\n"], ["dos"], []),
        ([b"dos\r", b"\nnext\n"], ["dos", "next"], []),
        ([b" 10%\r 20%", b"\r 30%\r", b"100%\ndone\n"], ["100%", "done"], []),
        ([b" 10%\r 20%\r"], [], [" 20%"]),
        ([b"\xff\xfe bad\n"], ["\ufffd\ufffd bad"], []),
        (["ä".encode()[:1], "ä".encode()[1:] + b"\n"], ["ä"], []),  # a character in two reads
        ([b"x" * 25 + b"\n"], ["x" * 10, "x" * 10, "x" * 5], []),
        ([b"x" * 25], ["x" * 10, "x" * 10], ["x" * 5]),
        (["äöüäöü".encode() + b"\n"], ["äöüäö", "ü"], []),
        (["xäöüäö".encode() + b"\n"], ["xäöüä", "ö"], []),  # cut between characters, not within one
        ([b"\x80" * 25 + b"\n"], None, []),  # continuation bytes without end must not hang it
    ],
)
def test_output_is_split_into_lines(
    writes: list[bytes], expected: list[str] | None, rest: list[str], pipe: tuple[int, int]
) -> None:
    read_end, write_end = pipe
    log_pipe = LogPipe(read_end, "stdout", line_bytes_max=10)
    found: list[str] = []
    for write in writes:
        os.write(write_end, write)
        found += texts(log_pipe.read())  # type: ignore[arg-type]
    if expected is not None:
        assert found == expected
    assert texts(log_pipe.close()) == rest  # type: ignore[arg-type]


def test_lines_have_the_name_of_who_printed_them_and_no_mark(pipe: tuple[int, int], tmp_path: Path) -> None:
    read_end, write_end = pipe
    log = WorkerLog(tmp_path / "w1.log")
    log_pipe = LogPipe(read_end, "stdout", log)
    mark = "\x1b]clusterpool;{}\x07"
    os.write(write_end, f"a\n{mark.format('f')}b\nc".encode())
    lines = log_pipe.read()
    os.write(write_end, f"{mark.format('fé')}d\n{mark.format('')}e".encode())
    lines += [*log_pipe.read(), *log_pipe.close()]
    assert [(line.name, line.text) for line in lines] == [("", "a"), ("f", "b"), ("fé", "cd"), ("", "e")]
    log.close()
    assert log.path.read_text() == "a\nb\ncd\ne"


def test_read_never_blocks_and_sees_the_end(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    log_pipe = LogPipe(read_end, "stderr")
    assert log_pipe.read() == []
    assert not log_pipe.is_at_end
    os.write(write_end, b"last")
    os.close(write_end)
    assert [(line.stream, line.text) for line in log_pipe.read()] == [("stderr", "last")]
    assert log_pipe.is_at_end
    assert log_pipe.read() == []
    assert log_pipe.close() == []


def test_one_call_reads_a_bounded_amount(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    os.write(write_end, b"0123456\n" * 1000)
    log_pipe = LogPipe(read_end, "stdout")
    assert len(log_pipe.read(800)) == 100
    assert len(log_pipe.read()) == 900


def test_an_endless_line_takes_no_endless_memory(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    log_pipe = LogPipe(read_end, "stdout", line_bytes_max=100)
    for _ in range(100):
        os.write(write_end, b"x" * 1000 + b"\r" + b"y" * 50)
        log_pipe.read()
        assert len(log_pipe._unfinished) <= 100


def test_the_log_has_both_streams_as_they_came(tmp_path: Path, pipe: tuple[int, int]) -> None:
    log = WorkerLog(tmp_path / "w1.log")
    read_end, write_end = pipe
    log_pipe = LogPipe(read_end, "stdout", log)
    assert not log.path.exists()
    os.write(write_end, b"a\xff\r\nb")
    log_pipe.read()
    log.append(b"from stderr\n")
    log.close()
    assert log.path.read_bytes() == b"a\xff\r\nbfrom stderr\n"
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_a_log_is_bounded_and_keeps_the_latest(tmp_path: Path) -> None:
    log = WorkerLog(tmp_path / "w1.log", bytes_max=1000)
    for number in range(1000):
        log.append(b"%06d\n" % number)
    log.append(b"y" * 5000)
    log.append(b"the end")
    log.close()
    kept = log.older_path.read_bytes() + log.path.read_bytes()
    assert len(kept) <= 1000
    assert kept.endswith(b"the end")
    assert kept.startswith(b"y")


def test_lines_arrive_though_the_log_cannot_be_written(tmp_path: Path, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    log_pipe = LogPipe(read_end, "stdout", WorkerLog(tmp_path / "missing" / "w1.log"))
    os.write(write_end, b"still here\n")
    assert texts(log_pipe.read()) == ["still here"]  # type: ignore[arg-type]


def test_the_oldest_logs_go_first_and_those_in_use_stay(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / f"w{number}.log"
        path.touch()
        os.utime(path, (number, number))
    (tmp_path / "other.txt").touch()
    removed = prune_logs(tmp_path, in_use=[tmp_path / "w0.log"], files_max=3)
    assert removed == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.txt",
        "w0.log",
        "w3.log",
        "w4.log",
        "w5.log",
    ]


@pytest.mark.parametrize(
    "make", [lambda: WorkerLog(Path("x"), bytes_max=1), lambda: LogPipe(0, "stdout", line_bytes_max=1)]
)
def test_bounds_that_cannot_hold_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="max"):
        make()  # type: ignore[operator]
