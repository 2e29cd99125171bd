"""Run one `vla` command and write down what it does beyond computing: `python audited.py RECORD ALLOWED... -- WORDS...`

An audit hook hears what the interpreter does (PEP 578): sockets, other programs, and every call that writes, below which
folder it may. RECORD gets one line for each that was not allowed. A library in C that bypasses the interpreter is not
heard; `tests/test_audit.py` looks at the folders themselves, too. Allowed are the folders named, what `vla.files` writes
beside them until it takes their place, and this same interpreter as another program (libraries ask themselves things).
"""

import os
import re
import sys

CHANGES = {  # event -> the places of paths among its arguments
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (0, 1), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "shutil.rmtree": (0,),
    "shutil.move": (0, 1), "shutil.copyfile": (1,),
}  # fmt: skip
PROGRAMS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "pty.spawn",
    "os.fork",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main(argv: list[str]) -> int:
    """Run the words; the exit status is that of the verb."""
    split = argv.index("--")
    record, allowed, words = argv[1], [os.path.realpath(p) for p in argv[2:split]], argv[split + 1 :]
    seen: set[str] = set()
    busy = False

    def inside(path: object) -> bool:
        if isinstance(path, int):
            return True  # an open file: its opening was heard
        place = os.path.realpath(os.fsdecode(path))
        beside = re.sub(r"/\.(?:tmp|old|gone)-([^/]+)-[0-9a-f]{8}(?=/|$)", r"/\1", place)
        return place == "/dev/null" or any(beside == a or beside.startswith(a + os.sep) for a in allowed)

    def hear(event: str, args: tuple) -> None:
        nonlocal busy
        if busy:
            return
        busy = True  # what this function does itself is not heard
        try:
            said = ""
            if event.startswith("socket."):
                said = f"{event} {args[1:]}"
            elif event in PROGRAMS:
                said = f"{event} {args[:2]}" if args[0] != sys.executable else ""
            elif event == "pickle.find_class":
                said = f"{event} {args}"
            elif event == "open" and isinstance(args[2], int) and args[2] & WRITING and not inside(args[0]):
                said = f"open {args[0]}"
            elif event == "os.mkdir" and os.path.isdir(args[0]):
                said = ""  # it makes nothing
            elif event in CHANGES and not all(inside(args[i]) for i in CHANGES[event]):
                said = f"{event} {args}"
            if said and said not in seen:
                seen.add(said)
                with open(record, "a") as file:
                    file.write(said + "\n")
        finally:
            busy = False

    open(record, "w").close()
    sys.addaudithook(hear)
    from vla.cli import main as run

    return run(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
