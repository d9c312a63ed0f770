"""The allocator of the commands: what it keeps, and when it is left alone."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys
from todi_offline.commands.allocator import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(20):
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def pages(*arguments, **environment):
    """Return how many pages a process was given that fills and frees 64 MiB twenty times."""
    command = [sys.executable, "-c", PAGES, *arguments]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no such setting")
def test_freed_memory_is_used_again_instead_of_new_pages():
    assert pages("keep") < pages() / 2


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no such setting")
def test_an_allocator_that_the_user_has_set_stays_as_it_is():
    assert pages("keep", MALLOC_MMAP_THRESHOLD_="1000000") > pages() / 2
