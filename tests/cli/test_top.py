# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs top`: real servers, and a real terminal."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys

import pytest

from nbdjobs.cli.demo_writer import Writer, negotiate
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.main import main
from tests.cli.conftest import Operated
from tests.cli.terminal import PATIENCE_S, Terminal

#: Often enough for tests that wait for the next look.
QUICK = ("--interval", "0.1")


def on_terminal(operated: Operated) -> Terminal:
    return Terminal("top", "--qmp", str(operated.socket), *QUICK)


def test_one_screen_is_printed_where_there_is_no_terminal(
    operated: Operated, capsys: pytest.CaptureFixture[str]
) -> None:
    operated.start_job()
    assert operated.run("top", *QUICK) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].rstrip().endswith(f"at {operated.socket}")
    [export] = [line.split() for line in lines if line.startswith("export-disk0 ")]
    assert export[1] == ("0" if operated.is_ours else "-")
    assert any(line.startswith("j ") and "backup" in line for line in lines)
    assert "├── export export-disk0 (nbd)" in lines


def test_a_terminal_that_cannot_be_drawn_on_gets_one_screen(operated: Operated) -> None:
    words = ("top", "--qmp", str(operated.socket), *QUICK)
    with Terminal(*words, environment={"TERM": "dumb"}) as terminal:
        text = terminal.rest()
        assert terminal.process.returncode == ExitCode.DONE
    assert text.count("EXPORT") == 1
    assert "\x1b[?1049h" not in text


def test_programs_read_an_object(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    operated.start_job()
    assert operated.run("top", "--once", "--json", *QUICK) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    [export], [job] = found["exports"], found["jobs"]
    assert (export["id"], job["id"], job["status"]) == ("export-disk0", "j", "running")
    assert "disk0" in {node["node-name"] for node in found["nodes"]}


def test_programs_read_an_object_per_interval_until_they_end_it(operated: Operated) -> None:
    words = [sys.executable, "-m", "nbdjobs", "top", "--json", "--qmp", str(operated.socket)]
    with subprocess.Popen([*words, *QUICK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert json.loads(process.stdout.readline())["exports"][0]["id"] == "export-disk0"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == ExitCode.DONE
    operated.execute("query-jobs")


def test_what_clients_do_is_measured_and_the_server_left_as_it_was(operated: Operated) -> None:
    if not operated.is_ours:
        pytest.skip("qemu-storage-daemon keeps no statistics of exports")
    words = [sys.executable, "-m", "nbdjobs", "top", "--json", "--qmp", str(operated.socket)]
    with (
        socket.socket(socket.AF_UNIX) as connection,
        subprocess.Popen([*words, *QUICK], stdout=subprocess.PIPE, text=True) as process,
    ):
        connection.connect(str(operated.daemon.nbd_socket))
        size = negotiate(connection, "disk0")
        writer = Writer(connection, size, random.Random(0))
        assert process.stdout is not None
        for line in process.stdout:
            [export] = json.loads(line)["exports"]
            if export["write"]["latency-p50-ns"] is not None:
                break
            write_some(writer)
        write = export["write"]
        assert (export["clients"], export["read"]["operations-per-second"]) == (1, 0)
        assert write["bytes-per-second"] > write["operations-per-second"] > 0
        assert 0 < write["latency-p50-ns"] <= write["latency-p99-ns"]
        assert write["latency-average-ns"] > 0
        assert has_histograms(operated)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == ExitCode.DONE
        writer.end()
    assert not has_histograms(operated)


def write_some(writer: Writer) -> None:
    goal = writer.counts.writes + 10
    writer.write_until(lambda: writer.counts.writes >= goal)


def has_histograms(operated: Operated) -> bool:
    [entry] = operated.execute("query-blockstats")
    return "wr_latency_histogram" in entry["stats"]


def test_q_leaves_the_terminal_as_it_was(operated: Operated) -> None:
    with on_terminal(operated) as terminal:
        terminal.wait_for("q quits")
        terminal.wait_for("EXPORT")
        terminal.type("q")
        assert terminal.rest().endswith("\x1b[?1049l")
        assert terminal.process.returncode == ExitCode.DONE


def test_ctrl_c_is_an_ordinary_end(operated: Operated) -> None:
    with on_terminal(operated) as terminal:
        terminal.wait_for("EXPORT")
        terminal.process.send_signal(signal.SIGINT)
        assert "Traceback" not in terminal.rest()
        assert terminal.process.returncode == ExitCode.DONE


def test_p_pauses_and_resumes_the_job(operated: Operated) -> None:
    operated.start_job()
    with on_terminal(operated) as terminal:
        terminal.wait_for("running")
        terminal.type("p")
        terminal.wait_for("job 'j' is to pause")
        operated.wait_status("paused")
        terminal.wait_for("paused")
        terminal.type("p")
        terminal.wait_for("job 'j' goes on")
        operated.wait_status("running")


def test_a_server_that_goes_away_is_one_sentence(operated: Operated) -> None:
    with on_terminal(operated) as terminal:
        terminal.wait_for("EXPORT")
        operated.execute("quit")
        after_screen = terminal.rest().rpartition("\x1b[?1049l")[2]
        assert terminal.process.returncode == ExitCode.FAILED
    [sentence] = after_screen.replace("\x1b[?25h", "").splitlines()
    assert sentence.startswith(f"nbdjobs: the server at '{operated.socket}' closed the session")


@pytest.mark.parametrize("text", ["0", "0.01", "-1", "inf", "nan", "x", ""])
def test_an_interval_has_a_least(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--interval", text])
    assert f"'{text}' is not an interval: expected 0.1" in capsys.readouterr().err
