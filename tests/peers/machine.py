"""The machine that is measured on: what it is, and whether something else runs on it."""

import os
import platform
import time
from pathlib import Path


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _busy():
    """Processor seconds that the machine spent on anything, since it started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own():
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Watch:
    """Tells what share of one processor others took while something was measured."""

    def __enter__(self):
        self.start, self.busy, self.own = time.perf_counter(), _busy(), _own()
        return self

    def __exit__(self, *_):
        seconds = time.perf_counter() - self.start
        # The clock of /proc/stat is coarse: a tick or two a processor are no disturbance.
        slack = 2 * (os.cpu_count() or 1) / os.sysconf("SC_CLK_TCK")
        self.foreign = max(0.0, _busy() - self.busy - (_own() - self.own) - slack) / seconds
        return False


def wait_until_idle(most=120.0, share=0.05):
    """Waits until others take less than `share` of a processor; says whether they ever did."""
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        with Watch() as watch:
            time.sleep(1)
        if watch.foreign < share:
            return True
    return False
