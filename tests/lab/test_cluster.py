"""The lab itself: its hosts have names, addresses and links of their own, and its SLURM runs jobs on them."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.cluster import missing


def test_a_job_runs_on_both_hosts(lab, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\nsrun sh -c 'hostname; cat /proc/net/fib_trie'\n"
    )
    job = lab.submit(f"--output={tmp_path}/out", script)
    assert lab.wait(job) == "COMPLETED"
    printed = (tmp_path / "out").read_text()
    for rank, host in enumerate(lab.hosts[:2]):
        assert host.name in printed.splitlines()
        assert f"10.77.0.{rank + 1}" in printed


def test_a_failed_job_is_seen_to_have_failed(lab, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\nexit 3\n")
    assert lab.wait(lab.submit(f"--output={tmp_path}/out", script)) == "FAILED"


def test_a_link_is_shaped_cut_and_mended(lab):
    one, other = lab.hosts[:2]
    listens = "import socket; s = socket.create_server(('', 5001)); c, _ = s.accept(); "
    listens += "n = 0\nwhile data := c.recv(1 << 20): n += len(data)\nprint(n)"
    sends = f"import socket, time; s = socket.create_connection(('{other.name}', 5001)); t = time.time(); "
    sends += "s.sendall(bytes(5_000_000)); s.close()"
    lab.network.shape(100)
    try:
        for _ in range(2):
            before = lab.sent(0)
            receiver = other.start("python3", "-c", listens, stdout=subprocess.PIPE, text=True)
            time.sleep(0.5)
            start = time.monotonic()
            one.run("python3", "-c", sends)
            assert receiver.communicate(timeout=10)[0] == "5000000\n"
            assert 0.3 < time.monotonic() - start < 3  # 0.4 s at 100 Mbit/s, which a buffer may shorten
            assert 5_000_000 < lab.sent(0) - before < 5_500_000
            lab.network.cut(1)
            with pytest.raises(AssertionError, match=r"timed out|unreachable|No route"):
                one.run("python3", "-c", sends.replace("5001)", "5001), 1"))
            lab.network.mend(1)
            time.sleep(0.2)
    finally:
        lab.network.mend(1)
        lab.network.shape(10_000)


def test_the_machine_keeps_its_own_name(lab):
    assert "10.77.0." not in Path("/etc/hosts").read_text()
    assert missing() is None
