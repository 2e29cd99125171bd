"""CPU time of verbs in a fresh interpreter: best, median and worst of N runs. Goals: `--help` 80 ms, `build` 150 ms.

    python benchmarks/bench_startup.py [--runs N] [--before FOLDER] [--write]

`--before` names the `core/src` of another checkout, which is measured in turns with this one. CPU time (user and
system, of the child alone), not wall time, so that neighbours count for less; they still cost cache and clock.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "startup.md"
CALL = "from vla.cli import main; main({!r}.split())"
BUILD = "build --head ki --tokenizer fast --backbone paligemma"
# label -> (code, goal in ms or None)
VERBS = {
    "python -c pass": ("pass", None),
    "vla --help": (CALL.format("--help"), 80),
    f"vla {BUILD}": (CALL.format(BUILD), 150),
    f"vla {BUILD} --preset tiny": (CALL.format(f"{BUILD} --preset tiny"), 150),
    "vla build --help": (CALL.format("build --help"), None),
    "vla build --head ki --tokenizer paligemma (a misfit)": (
        CALL.format("build --head ki --tokenizer paligemma"),
        None,
    ),
    "vla list": (CALL.format("list"), None),
    "vla fits": (CALL.format("fits"), None),
    "vla show pi05_ki --no-sizes": (CALL.format("show pi05_ki --no-sizes"), None),
    "vla train --help": (CALL.format("train --help"), None),
    "vla.build(...) in Python": ("import vla; vla.build(head='ki', tokenizer='fast', backbone='paligemma')", None),
}


def cpu_ms(code, source):
    """CPU time of one run, with the vla of `source` or, for None, the installed one."""
    env = {**os.environ, **({"PYTHONPATH": source} if source else {})}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    _, _, usage = os.wait4(child.pid, 0)
    return 1000 * (usage.ru_utime + usage.ru_stime)


def measure(runs, sources):
    """label -> for each source the times, taken in turns after one run that fills the caches."""
    out = {}
    for label, (code, _) in VERBS.items():
        times = [[] for _ in sources]
        for turn in range(runs + 1):
            for own, source in zip(times, sources, strict=True):
                ms = cpu_ms(code, source)
                if turn:
                    own.append(ms)
        out[label] = times
        now = "   before: ".join(f"best {min(t):4.0f}   median {statistics.median(t):4.0f} ms" for t in reversed(times))
        print(f"{label:<70} {now}", flush=True)
    return out


def page(found, runs, before):
    head = ["verb", "goal", "best", "median", "worst", *(["best before", "median before"] if before else [])]
    machine = f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}"
    lines = [
        "# Start-up: CPU time of verbs",
        "",
        f"`python benchmarks/bench_startup.py --runs {runs}{' --before FOLDER' if before else ''} --write`.",
        "Milliseconds of CPU time (user and system) of a fresh interpreter, from its start to its end.",
        f"{machine}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} while measuring: others were at work.",
    ]
    if before:
        lines.append(f"Before: {before}; measured in turns with the present state.")
    lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for label, times in found.items():
        now, goal = times[-1], VERBS[label][1]
        cells = [f"`{label}`", f"{goal}" if goal else "", *(f"{f(now):.0f}" for f in (min, statistics.median, max))]
        cells += [f"{f(times[0]):.0f}" for f in (min, statistics.median)] if before else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--before", default="", help="core/src of another checkout")
    parser.add_argument("--what", default="another checkout", help="what that checkout is, for the page")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    given = parser.parse_args()
    found = measure(given.runs, [given.before, None] if given.before else [None])
    if given.write:
        RESULT.write_text(page(found, given.runs, given.before and given.what), encoding="utf-8")
