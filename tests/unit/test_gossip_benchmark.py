"""The agent of the gossip benchmark speaks the lines that drivers read; what they measure is not asserted."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio

from mesh.state import encode_load
from mesh.view import Address, MemberStatus, MemberView, NodeLoad, NodeProfile
from tests.benchmark.gossip.__main__ import parse
from tests.benchmark.gossip.agent import LoadWatch, load_of, profile_of
from tests.benchmark.gossip.agents import KEY, Ours, Serf, State
from tests.benchmark.gossip.cluster import Sighting, What
from tests.benchmark.gossip.measurements import episodes
from tests.benchmark.gossip.rows import spread

DEADLINE_S = 60.0  # only a hang reaches it


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def agent(name: str, port: int, seed: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.benchmark.gossip.agent", name, f"127.0.0.1:{port}", seed, KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The lines up to the first that holds the text."""
    assert process.stdout is not None
    lines: list[str] = []
    with trio.fail_after(DEADLINE_S):
        while not lines or text not in lines[-1]:
            lines.append(await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True))
            assert lines[-1], f"the agent ended after {lines}"
    return lines


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


async def test_agents_say_who_joins_changes_calls_and_leaves() -> None:
    port = free_port()
    with ExitStack() as stack:
        first = stack.enter_context(agent("n0", port, "-"))
        await read_until(first, "agent running")
        second = stack.enter_context(agent("n1", free_port(), f"127.0.0.1:{port}"))
        await read_until(second, "EventMemberJoin: n0 127.0.0.1")
        await read_until(first, "EventMemberJoin: n1 127.0.0.1")
        for command in ("load " + "x" * 300, "profile " + "y" * 300, "tags z"):
            tell(second, command)
            await read_until(first, "EventMemberUpdate: n1 ")
        tell(second, "event e0|" + "p" * 200)
        await read_until(first, "received event: user-event: e0")
        tell(second, "dance")
        await read_until(second, "there are load, profile, tags and event")
        assert second.stdin is not None
        second.stdin.close()
        await read_until(first, "EventMemberLeave: n1 ")
        assert second.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("size", [60, 200, 300])
def test_a_text_becomes_a_load_of_about_its_size(size: int) -> None:
    assert abs(len(encode_load(load_of("x" * size))) - size) <= 20
    assert load_of("x" * size) != load_of("y" * size)


def test_a_text_becomes_a_profile_that_holds_it() -> None:
    profile = profile_of("x" * 450)
    assert profile.version + "".join(model.name for model in profile.models) == "x" * 450


def test_a_load_published_again_is_no_update() -> None:
    def view(version: int, load: NodeLoad) -> dict[str, MemberView]:
        there = Address("10.0.0.2", 7946)
        return {
            "b": MemberView("b", there, MemberStatus.ALIVE, 1, version, load, NodeProfile(), 0.0, False, 0.0, version)
        }

    watch = LoadWatch()
    assert watch.look(view(1, load_of("one"))) == []  # it is new, not changed
    assert watch.look(view(2, load_of("one"))) == []
    assert [member.node_id for member in watch.look(view(3, load_of("two")))] == ["b"]


def test_commands_name_the_host_and_the_seed() -> None:
    assert Ours().command(3, "10.77.0.4", "10.77.0.1")[-4:] == ["n3", "10.77.0.4:7946", "10.77.0.1:7946", KEY]
    assert Ours().command(0, "10.77.0.1", None)[-2] == "-"
    assert "-retry-join=10.77.0.1:7947" in Serf().command(3, "10.77.0.4", "10.77.0.1")
    assert State.LOAD in Ours().states


def test_obituaries_of_one_node_within_half_a_minute_are_one_death() -> None:
    views = [Sighting(at, 0, What.FAILED, subject) for at, subject in ((0.0, 1), (1.0, 1), (2.0, 2), (60.0, 1))]
    assert episodes(views) == 3


def test_a_spread_of_nothing_has_no_median() -> None:
    assert spread([]) == {"count": 0}
    assert spread([3.0, 1.0, 2.0]) == {"count": 3, "median": 2.0, "p95": 3.0, "max": 3.0}


def test_options_that_cannot_be_measured_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["2"], ["5", "--only", "join,speed"], ["5", "--kinds", "etcd"]):
        with pytest.raises(SystemExit):
            parse(arguments)
    assert "no measurement is called speed" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_the_cpu_of_one_node_among_few_peers_is_measured_to_its_end() -> None:
    options = ["--peers", "4", "--warm-up-s", "0", "--duration-s", "1"]
    command = [sys.executable, "-m", "tests.benchmark.gossip.cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert '"n": 5' in done.stdout
