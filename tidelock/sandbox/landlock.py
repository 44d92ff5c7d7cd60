"""Landlock through ctypes: a process gives up write access to everything but a few paths, and its TCP sockets.

Kernel documentation: userspace-api/landlock. Needs no root, no daemon, no package; kernel 5.13 or later.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from .toolset import SandboxError

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
RULE_PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
ALL_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}  # by ABI; 5+: 16 bits
READ_RIGHTS = EXECUTE | READ_FILE | READ_DIR
FILE_ONLY = EXECUTE | WRITE_FILE | READ_FILE | (1 << 14) | (1 << 15)  # rights that make sense on a plain file
NET_RIGHTS = 0b11  # bind and connect TCP (ABI 4)
SCOPES = 0b11  # abstract unix sockets and signals (ABI 6)

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The kernel's Landlock ABI version; 0 where there is none."""
    version = _libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, version)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise SandboxError(f"landlock: {what}: {os.strerror(ctypes.get_errno())}")
    return result


def no_new_privileges() -> None:
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def restrict(readable: Sequence[str], writable: Sequence[str]) -> int:
    """Confine this thread and its future children; returns the ABI used. Raises SandboxError when it cannot.

    Paths that do not exist are skipped: nothing is granted there.
    """
    version = abi()
    if version == 0:
        raise SandboxError("this kernel has no Landlock")
    rights = ALL_FILE_RIGHTS.get(version, (1 << 16) - 1)
    attributes = struct.pack("QQQ", rights, NET_RIGHTS if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _libc.syscall(CREATE_RULESET, ctypes.c_char_p(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    _check(ruleset, "create_ruleset")
    try:
        for path, allowed in [(p, READ_RIGHTS) for p in readable] + [(p, rights) for p in writable]:
            _allow(ruleset, path, allowed & rights)
        no_new_privileges()
        _check(_libc.syscall(RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "restrict_self")
    finally:
        os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= FILE_ONLY
        rule = struct.pack("=Qi", rights, fd)
        result = _libc.syscall(ADD_RULE, ruleset, ctypes.c_int(RULE_PATH_BENEATH), ctypes.c_char_p(rule), ctypes.c_uint32(0))
        _check(result, f"add_rule {path}")
    finally:
        os.close(fd)
