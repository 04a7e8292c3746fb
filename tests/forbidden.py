"""Let the system end this process when it connects to anything, native libraries included."""

from __future__ import annotations

import ctypes
import platform
import struct
import sys

CONNECT = {"x86_64": (42, 44, 46), "aarch64": (203, 206, 211)}
"""Numbers of the system calls connect, sendto and sendmsg; opening a socket alone asks nobody anything."""
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # of prctl
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of the filter's own language: load a word, jump if equal, return
KILL, ALLOW = 0x80000000, 0x7FFF0000
NUMBER = 0  # where the call's number lies


def available() -> bool:
    """Whether this system can do that."""
    return sys.platform == "linux" and platform.machine() in CONNECT


def forbid_connections() -> None:
    """From now on, a connection or a message ends this process with SIGSYS; there is no way back."""
    calls = CONNECT[platform.machine()]
    tests = [(EQUAL, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    instructions = [(LOAD, 0, 0, NUMBER), *tests, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, KILL)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for words in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SECCOMP, FILTER, program)):
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
