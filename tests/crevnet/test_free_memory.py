import pytest
import torch

from crevnet.free_memory import free_bytes

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:    1000 kB\n"


@pytest.fixture
def machine(tmp_path):
    """A machine with 1000 KiB available and the files that are given."""

    def make(files):
        for name, text in ({"proc/meminfo": MEMINFO} | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def group(folder, limit, used, cached, version=2):
    """The files of a control group."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    contents = (f"{limit}\n", f"{used}\n", f"anon 1\n{names[2]} {cached}\n")
    return {f"sys/fs/cgroup/{folder}/{n}": c for n, c in zip((*names[:2], "memory.stat"), contents, strict=True)}


def test_this_machine_has_some():
    assert 2**20 < free_bytes(CPU) < 2**50


def test_without_control_groups_it_is_what_the_kernel_can_give(machine):
    assert free_bytes(CPU, machine({})) == 1000 * 1024


def test_a_limit_counts_without_the_cached_files(machine):
    files = {"proc/self/cgroup": "0::/mine\n"} | group("mine", 5000, 3000, 400)
    assert free_bytes(CPU, machine(files)) == 2400


def test_a_limit_further_up_counts_too(machine):
    files = {"proc/self/cgroup": "0::/outer/mine\n"} | group("outer", 900, 300, 0) | group("outer/mine", "max", 1, 0)
    assert free_bytes(CPU, machine(files)) == 600


def test_a_group_of_the_first_version(machine):
    membership = "9:name=systemd:/\n5:cpu,memory:/mine\n2:cpuset:/\n"
    files = {"proc/self/cgroup": membership} | group("memory/mine", 5000, 3000, 400, version=1)
    assert free_bytes(CPU, machine(files)) == 2400


def test_in_a_container_the_group_is_at_the_top(machine):
    files = {"proc/self/cgroup": "4:memory:/docker/ab12\n"} | group("memory", 5000, 3000, 0, version=1)
    assert free_bytes(CPU, machine(files)) == 2000


def test_the_machine_may_have_less_than_the_limit(machine):
    files = {"proc/self/cgroup": "0::/\n"} | group(".", 2**40, 0, 0)
    assert free_bytes(CPU, machine(files)) == 1000 * 1024


def test_a_group_beyond_its_limit_has_nothing_left(machine):
    files = {"proc/self/cgroup": "0::/\n"} | group(".", 100, 300, 0)
    assert free_bytes(CPU, machine(files)) == 0


def test_where_the_kernel_does_not_say_it_is_all_there_is(tmp_path):
    assert free_bytes(CPU, tmp_path) >= free_bytes(CPU)


def test_a_gpu_says_so_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert free_bytes(torch.device("cuda")) == 7
