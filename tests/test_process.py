"""What a process of ours is set up with."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, threading
from nc_audit.process import keep_freed_memory
{set_up}
def work():
    for _ in range(12):
        held = [bytearray(b"x") * 40_000_000 for _ in range(2)]
        del held
def faults():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
print(faults() - first)
"""


def _faults(set_up: str, **environment: str) -> int:
    """Page faults of a thread that takes and frees 80 MB again and again, once it has done so before."""
    code = _FAULTS.format(set_up=set_up)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is set is set in glibc")
def test_freed_memory_is_used_again():
    handed_back = _faults("")
    assert handed_back > 100_000  # 12 times 80 MB in pages of 4 KB, most of them anew
    assert _faults("keep_freed_memory()") < handed_back / 10


def test_who_says_how_memory_is_kept_is_heard():
    if not sys.platform.startswith("linux"):
        pytest.skip("what is set is set in glibc")
    assert _faults("keep_freed_memory()", MALLOC_MMAP_THRESHOLD_="1000000") > 100_000
