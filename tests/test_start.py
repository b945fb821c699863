"""How workers find each other, which interface Gloo is told to use, and how their processes end."""

import os
import socket
import subprocess
import sys

import pytest

from lightning_localsgd import start
from lightning_localsgd.start import name_interface
from tests.shell import ROOT

HOSTS = {"me": "127.0.1.1", "fine": "10.77.0.2", "rank0": "10.77.0.1", "localhost": "127.0.0.1"}


@pytest.fixture
def host(monkeypatch):
    """Return what makes this host one of that name and with these interfaces; it reaches others from 10.77.0.2."""

    class Probe(socket.socket):
        def connect(self, address):
            if socket.gethostbyname(address[0]) == "10.88.0.1":
                raise OSError("no route")

        def getsockname(self):
            return "10.77.0.2", 40000

    def resolve(name):
        if name.startswith("10."):
            return name
        if name not in HOSTS:
            raise socket.gaierror(name)
        return HOSTS[name]

    def make(name, addresses):
        monkeypatch.setattr(start, "gethostname", lambda: name)
        monkeypatch.setattr(start, "addresses_of_interfaces", lambda: addresses)

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back as it was
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    return make


@pytest.mark.parametrize(
    ("name", "addresses", "meets_at", "expected"),
    [
        ("me", {"eth0": "10.77.0.2", "eth1": "10.99.0.2"}, "rank0", "eth0"),  # the one that leads there
        ("me", {"eth0": "10.99.0.2", "eth1": "10.77.0.2"}, "10.77.0.1", "eth1"),
        ("unknown", {"eth0": "10.77.0.2"}, "rank0", "eth0"),  # a name that stands for nothing
        ("me", {"eth0": "10.77.0.2"}, "me", "eth0"),  # on rank 0 its own name may be where all meet
        ("me", {"eth0": "10.77.0.2", "eth1": "10.99.0.2"}, "me", None),  # and which is meant is not known
        ("me", {"eth0": "10.99.0.2"}, "rank0", None),
        ("me", {"eth0": "10.77.0.2", "eth1": "10.77.0.2"}, "rank0", None),
        ("me", {}, "rank0", None),
        ("fine", {"eth0": "10.77.0.2"}, "rank0", None),  # Gloo finds it by itself
        ("me", {"eth0": "10.77.0.2"}, "127.0.0.1", None),  # all are on this host
        ("me", {"eth0": "10.77.0.2"}, "localhost", None),
    ],
)
def test_an_interface_is_named_where_the_hosts_name_is_a_loopback_address(host, name, addresses, meets_at, expected):
    host(name, addresses)
    name_interface(meets_at)
    assert start.os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_without_a_route_the_only_interface_is_taken(host):
    host("me", {"eth0": "10.77.0.2"})
    name_interface("10.88.0.1")
    assert start.os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_the_address_of_an_interface_is_one_that_this_host_can_bind():
    for address in start.addresses_of_interfaces().values():
        with socket.socket() as bound:
            bound.bind((address, 0))


ENDS = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from lightning_localsgd.header import Header

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
Header(rank, 2, timedelta(seconds=20))
for number in range(30):  # the first is waited for, and makes the connections; some of the others are still under way
    work = dist.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3), async_op=True)
    if not number:
        work.wait()
"""


def test_a_process_that_ends_right_after_a_collective_does_not_abort(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    for turn in range(3):
        words = [sys.executable, script]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        both = [
            subprocess.Popen([*words, str(rank), tmp_path / f"store-{turn}"], env=env, stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        said = [one.communicate(timeout=60)[1] for one in both]
        assert [one.returncode for one in both] == [0, 0], said
