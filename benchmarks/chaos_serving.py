"""Fifty faults between a robot at 50 Hz and its server: processes that die or freeze, links that stall, cut and lie.

    python benchmarks/chaos_serving.py              benchmarks/results/serving_chaos.md
    python benchmarks/chaos_serving.py --only frozen

Every tick is looked at (`tests/helpers/chaos.py`): finite, within limits, no jump, never older than a second. After the
fault the robot plays chunks again within two seconds; after a restart with other weights it never does.
"""

import argparse
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))

from chaos import PLAN, Host, drive  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    load, rows, failed, number = os.getloadavg()[0], [], 0, 0
    for scenario, count in PLAN.items():
        if only not in ("", scenario):
            continue
        for i in range(count):
            number += 1
            host = Host(bad=scenario if scenario in ("nan", "wild") else "")
            seconds = 0.5 + 3.0 * i / max(1, count - 1) if count > 1 else 2.0
            try:
                seen = drive(scenario, number, host, seconds)
                end = "refused, held" if seen["refused"] else f"{seen['recovery']:.2f}"
                met = ", ".join(f"{n} {what}" for what, n in sorted(seen["counts"].items())) or "nothing"
                row = (number, scenario, f"{seconds:.1f}", seen["ticks"], seen["chunk"], seen["fallback"], end,
                       f"{seen['slowest_ms']:.1f}", met)  # fmt: skip
            except AssertionError as error:
                failed += 1
                row = (number, scenario, f"{seconds:.1f}", "", "", "", f"FAILED: {error}", "", "")
            finally:
                host.stop()
            rows.append(row)
            print(*row, sep=" | ", flush=True)
    head = ("", "fault", "seconds", "ticks", "of chunks", "fallback", "recovery, s", "slowest tick, ms", "met")
    lines = [
        "# Serving: fifty faults", "",
        "Made by `python benchmarks/chaos_serving.py`. A robot at 50 Hz, chunks of 50 steps, a request every 10 ticks,",
        "a policy of 30 ms; every action is checked (finite, limits, change per tick, age). Recovery is counted from",
        f"the end of the fault. {platform.machine()}, {len(os.sched_getaffinity(0))} cores; "
        f"load average {load:.1f} at the start.",
        "", f"{len(rows) - failed} of {len(rows)} scenarios kept every invariant.", "",
        "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]  # fmt: skip
    if not only:
        (HERE / "results" / "serving_chaos.md").write_text("\n".join(lines) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
