"""Write ``containerkit/isolation/profiles/syscalls.py`` from a table of system call numbers.

The input is a CSV with a column a machine, as libseccomp's developers derive from every kernel release
(``src/syscalls.csv``)::

    python tests/support/gen_syscalls.py syscalls.csv > containerkit/isolation/profiles/syscalls.py
"""

from __future__ import annotations

import csv
import re
import sys
import textwrap

MACHINES = {"x86_64": "x86_64", "x32": "x32", "i386": "x86", "aarch64": "aarch64", "arm": "arm"}

HEAD = '''"""System call numbers by name, of Linux {version}; written by ``tests/support/gen_syscalls.py``, not by hand.

A number in a table says where the names behind it start; each further name is the next number.
"""

from __future__ import annotations

import functools

X32_BIT = 0x40000000
"""Set in the number of every x32 call: it shares x86_64's audit architecture."""
'''

FOOT = '''
_TABLES = {{
{entries}
}}


@functools.cache
def numbers(machine: str) -> dict[str, int]:
    """Name -> number for ``x86_64``, ``x32``, ``i386``, ``aarch64`` or ``arm``. Raises :class:`KeyError` for others."""
    table: dict[str, int] = {{}}
    following = X32_BIT if machine == "x32" else 0
    base = following
    for word in _TABLES[machine].split():
        if word.isdecimal():
            following = base + int(word)
        else:
            table[word] = following
            following += 1
    return table
'''


def table(rows: list[dict[str, str]], column: str) -> str:
    pairs = sorted((int(row[column]), row["#syscall"]) for row in rows if row[column].isdecimal())
    words: list[str] = []
    following = 0
    for number, name in pairs:
        if number != following:
            words.append(str(number))
        words.append(name)
        following = number + 1
    return textwrap.fill(" ".join(words), 118, break_long_words=False, break_on_hyphens=False)


def main(path: str) -> None:
    with open(path, newline="", encoding="ascii") as file:
        text = file.read()
    first, _, rest = text.partition("\n")
    version = re.search(r"\(v([^ ]+)", first)
    head = re.sub(r"^#syscall[^,]*", "#syscall", first)
    rows = list(csv.DictReader([head, *rest.splitlines()]))
    out = HEAD.format(version=version[1] if version else "unknown")
    for machine, column in MACHINES.items():
        out += f'\n_{machine.upper()} = """\n{table(rows, column)}\n"""\n'
    entries = "\n".join(f'    "{machine}": _{machine.upper()},' for machine in MACHINES)
    sys.stdout.write(out + FOOT.format(entries=entries))


if __name__ == "__main__":
    main(sys.argv[1])
