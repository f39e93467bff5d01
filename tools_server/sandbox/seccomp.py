"""The system call filter of the sandbox, as the classic BPF program that `bwrap --seccomp` reads.

Namespaces leave some doors open that this shuts: vsock reaches the hypervisor and netlink the kernel's
configuration in spite of the network namespace; io_uring, bpf, userfaultfd, perf events and keyrings are much
kernel for no use here. A call that is shut out fails with EPERM, so that a program sees an ordinary error; a
foreign architecture's call ends it.
"""

import errno
import platform
import struct

ALLOWED_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6: harmless without a network."""

_ARCHITECTURES = {
    # audit number; system calls: socket, socketpair, then those that are shut
    "x86_64": (0xC000003E, 41, 53, (425, 426, 427, 321, 298, 323, 248, 249, 250, 101, 155, 165, 246, 320, 175, 313)),
    "aarch64": (0xC00000B7, 198, 199, (425, 426, 427, 280, 241, 282, 217, 218, 219, 117, 41, 40, 104, 294, 105, 273)),
}
"""Shut: io_uring_setup, _enter, _register, bpf, perf_event_open, userfaultfd, add_key, request_key, keyctl, ptrace,
pivot_root, mount, kexec_load, kexec_file_load, init_module, finit_module."""
_X32 = 0x40000000
"""On x86-64, calls from here on are another numbering of the same calls."""

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Byte offsets in struct seccomp_data (both architectures are little-endian)."""
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM


def filter_program(machine: str = "") -> bytes:
    """The filter for `machine` (default: this one). Raises ValueError where its system calls are not known here."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"the sandbox's system call filter knows {known}, not {machine}: run it on one of these")
    audit, socket, socketpair, shut = _ARCHITECTURES[machine]
    # An instruction: code, operand, where to go if true, if false ("" is the next one).
    program: list[tuple[int, int, str, str]] = [
        (_LOAD, _ARCHITECTURE, "", ""),
        (_EQUAL, audit, "", "kill"),
        (_LOAD, _NUMBER, "", ""),
        (_AT_LEAST, _X32, "refuse", ""),
        *((_EQUAL, number, "refuse", "") for number in shut),
        (_EQUAL, socket, "family", ""),
        (_EQUAL, socketpair, "family", "allow"),
    ]
    labels = {"family": len(program)}
    program.append((_LOAD, _FIRST_ARGUMENT, "", ""))
    program += [(_EQUAL, family, "allow", "") for family in ALLOWED_FAMILIES]
    for label, verdict in (("refuse", _REFUSE), ("allow", _ALLOW), ("kill", _KILL)):
        labels[label] = len(program)
        program.append((_RETURN, verdict, "", ""))
    return b"".join(
        struct.pack("<HBBI", code, _jump(labels, true, i), _jump(labels, false, i), operand)
        for i, (code, operand, true, false) in enumerate(program)
    )


def _jump(labels: dict[str, int], label: str, position: int) -> int:
    """Instructions to skip."""
    return labels[label] - position - 1 if label else 0
