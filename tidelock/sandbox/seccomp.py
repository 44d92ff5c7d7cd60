"""A small seccomp-bpf filter: no sockets but local pairs, no tracing, no mounting, no new namespaces.

Landlock does not cover UDP, raw sockets or connecting to unix sockets by path; this does.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from .toolset import SandboxError

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
X32_BIT = 0x40000000

# (audit architecture, numbers of: socket, connect, bind, ptrace, mount, umount2, unshare, setns, bpf, keyctl, io_uring_setup,
#  process_vm_writev)
DENIED = {
    "x86_64": (0xC000003E, (41, 42, 49, 101, 165, 166, 272, 308, 321, 250, 425, 311)),
    "aarch64": (0xC00000B7, (198, 203, 200, 117, 40, 39, 97, 268, 280, 219, 425, 271)),
}


def available() -> bool:
    return platform.machine() in DENIED


def restrict() -> None:
    """Install the filter on this process. Needs no_new_privs. Raises SandboxError where it cannot."""
    if not available():
        raise SandboxError(f"no seccomp filter for {platform.machine()}")
    arch, numbers = DENIED[platform.machine()]
    code = [(LOAD, 0, 0, 4), (JUMP_EQUAL, 1, 0, arch), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        code += [(0x35, 0, 1, X32_BIT), (RETURN, 0, 0, KILL)]  # the x32 calls are the same calls by other numbers
    for number in numbers:
        code += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, DENY)]
    code.append((RETURN, 0, 0, ALLOW))
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0) != 0:
        raise SandboxError(f"seccomp: {errno.errorcode.get(ctypes.get_errno(), '?')}")
