"""CPU time of verbs in a fresh interpreter: best and median of N runs.  Goals: --help 80 ms, build 150 ms."""

import os
import statistics
import subprocess
import sys

CALL = "from vla.cli import main; main({!r}.split())"
VERBS = {
    "python -c pass": "pass",
    "vla --help": CALL.format("--help"),
    "vla build (ki, fast, paligemma)": CALL.format("build --head ki --tokenizer fast --backbone paligemma"),
    "vla build (a misfit, with the search)": CALL.format("build --head ki --tokenizer paligemma"),
    "vla.build in Python": "import vla; vla.build(head='ki', tokenizer='fast', backbone='paligemma')",
    "vla list": CALL.format("list"),
    "vla fits": CALL.format("fits"),
    "vla show pi05_ki --no-sizes": CALL.format("show pi05_ki --no-sizes"),
}


def cpu_ms(code, times):
    found = []
    for _ in range(times):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, _, usage = os.wait4(child.pid, 0)
        found.append(1000 * (usage.ru_utime + usage.ru_stime))
    return min(found), statistics.median(found)


if __name__ == "__main__":
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    for label, code in VERBS.items():
        best, median = cpu_ms(code, runs)
        print(f"{label:<40} best {best:5.0f} ms   median {median:5.0f} ms")
