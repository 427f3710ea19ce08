"""The inside of the sandbox: a program of its own that locks itself in and then runs source it does not trust.

    python -I -S jail.py SETTINGS < source

`sandbox.py` starts it with an empty environment and no descriptor but its pipes. It uses the standard library alone, so
that nothing of ours is in the memory of what it runs. Isolated, it goes through user, mount, PID, network, IPC and UTS
namespaces into a root of its own: the interpreter and the system's libraries to read, `/work` to write, four harmless
devices, no /proc, no network. Where the kernel has seccomp, a filter then takes away the system calls that a function
under test never needs. Exit status 125 means that the walls could not be built; the reason is on stderr.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

NOT_BUILT = 125
NOBODY = 65534
CHANNEL = "RLHF_CHANNEL"
"""Global of the source: the number of the descriptor that it may talk through, or None."""

PRIVATE, RECURSIVE, BIND, NO_SUID, NO_DEV = 1 << 18, 1 << 14, 1 << 12, 1 << 1, 1 << 2
NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
"""User, mount, PID, network, IPC, UTS."""
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442
DETACH = 2
PDEATHSIG, SET_DUMPABLE, CAPBSET_DROP, NO_NEW_PRIVS = 1, 4, 24, 38

SET_SECCOMP, FILTER = 22, 2
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine → column of the numbers below, and how a filter is told of it."""
DENIED = (
    (101, 117), (310, 270), (311, 271), (312, 272), (438, 438),  # ptrace, process_vm_readv, _writev, kcmp, pidfd_getfd
    (165, 40), (166, 39), (155, 41), (161, 51),  # mount, umount2, pivot_root, chroot
    (428, 428), (429, 429), (430, 430), (431, 431), (432, 432), (433, 433), (442, 442),  # open_tree … mount_setattr
    (272, 97), (308, 268), (303, 264), (304, 265),  # unshare, setns, name_to_handle_at, open_by_handle_at
    (248, 217), (249, 218), (250, 219),  # add_key, request_key, keyctl
    (321, 280), (298, 241), (323, 282), (447, 447),  # bpf, perf_event_open, userfaultfd, memfd_secret
    (425, 425), (426, 426), (427, 427), (278, 75), (300, 262),  # io_uring_setup, _enter, _register, vmsplice, fanotify
    (175, 105), (313, 273), (176, 106), (246, 104), (320, 294),  # init_, finit_, delete_module, kexec_load, _file_load
    (167, 224), (168, 225), (169, 142), (163, 89), (179, 60),  # swapon, swapoff, reboot, acct, quotactl
    (103, 116), (135, 92), (227, 112), (164, 170), (159, 171),  # syslog, personality, clock_settime … adjtimex
    (237, 235), (238, 237), (256, 238), (279, 239),  # mbind, set_mempolicy, migrate_pages, move_pages
)  # fmt: skip
"""System calls that fail with EPERM: (x86_64, aarch64) numbers. Ways into other processes, mounts, keys and the parts
of the kernel in which holes are found."""
CLONE, CLONE3, SOCKET, PRCTL = (56, 220), (435, 435), (41, 198), (157, 167)
FAMILIES = (1, 2, 10)
"""Sockets that may be made: Unix, IPv4, IPv6. Others stand in no network namespace (vsock), or are doors into the
kernel."""

libc = ctypes.CDLL(None, use_errno=True)


class NotBuilt(Exception):
    """A wall that this system does not let us build."""


def call(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise NotBuilt(f"{what}: {os.strerror(number)}")
    return result


def write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise NotBuilt(f"{path}: {error.strerror}") from None


def die_with_parent(parent: int) -> None:
    """At once where it is gone already. A fork does not inherit it, and a change of user takes it away."""
    call("prctl", libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    # A parent outside our PID namespace is 0, there or gone.
    if os.getppid() not in (parent, 0):
        os._exit(NOT_BUILT)


def enter_namespaces() -> None:
    """Own namespaces. Root becomes two users inside, itself to build the walls and nobody to live between them: the
    limit on processes never binds root, whatever namespace it is in. Any other user is only nobody."""
    uid, gid, me = os.getuid(), os.getgid(), os.getpid()
    if uid != 0:
        call("unshare", libc.unshare(NAMESPACES))
        write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
        write("/proc/self/setgroups", "deny")
        write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        return
    # Only a process outside may map two users.
    go_read, go_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(go_write)
            if os.read(go_read, 1):
                for kind in ("uid", "gid"):
                    write(f"/proc/{me}/{kind}_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                status = 0
        finally:
            os._exit(status)
    try:
        call("unshare", libc.unshare(NAMESPACES))
        os.write(go_write, b"x")
    finally:
        os.close(go_write)
        os.close(go_read)
        failed = os.waitpid(helper, 0)[1]
    if failed:
        raise NotBuilt("uid_map: Operation not permitted")


def close_kernel_doors() -> None:
    """No further user namespaces, in which all capabilities would be had again, and no System V memory, which no limit
    counts. A kernel that gives these settings to nobody but real root leaves them as they are."""
    for name in ("user/max_user_namespaces", "kernel/shmall", "kernel/shmmni", "kernel/msgmni"):
        try:
            write(f"/proc/sys/{name}", "0")
        except NotBuilt:
            continue


class MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


def read_only(path: str, *, recursive: bool) -> None:
    attributes = MountAttributes(set=0x1 | 0x2)  # read-only, no set-uid
    at = 0x8000 if recursive else 0
    size = ctypes.sizeof(attributes)
    call(
        f"read-only {path}",
        libc.syscall(MOUNT_SETATTR, -100, os.fsencode(path), at, ctypes.byref(attributes), ctypes.c_size_t(size)),
    )


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    data = options.encode() if options else None
    call(
        f"mount {target}",
        libc.mount(source.encode(), os.fsencode(target), kind and kind.encode(), ctypes.c_ulong(flags), data),
    )


def build_root(visible: list[str], work_bytes: int) -> None:
    """A root of our own: `visible` to read, /work to write, and nothing else."""
    number = PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise NotBuilt(f"pivot_root on {os.uname().machine} is not known here")
    mount("none", "/", None, PRIVATE | RECURSIVE)
    # It stands on /proc, which nothing needs from here on; any other directory might hold the interpreter.
    root = "/proc"
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEV, "size=1m,mode=755")
    for path in visible:
        inside = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            open(inside, "w").close()
        mount(path, inside, None, BIND | RECURSIVE)
        read_only(inside, recursive=True)
    os.mkdir(f"{root}/dev")
    for name in ("null", "zero", "random", "urandom"):
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND)
    os.mkdir(f"{root}/work")
    mount("tmpfs", f"{root}/work", "tmpfs", NO_SUID | NO_DEV, f"size={work_bytes},nr_inodes=1000,mode=777")
    os.symlink("work", f"{root}/tmp")
    read_only(root, recursive=False)
    os.chdir(root)
    call("pivot_root", libc.syscall(number, b".", b"."))
    call("umount", libc.umount2(b".", DETACH))
    os.chdir("/work")


class CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


def drop_privileges() -> None:
    """No capability, now or after an exec; root becomes nobody, whom a limit on processes binds."""
    for capability in range(64):
        if libc.prctl(CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, nothing = CapHeader(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capset", libc.capset(ctypes.byref(header), ctypes.byref(nothing)))
    call("prctl", libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))


class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("first", ctypes.POINTER(Instruction))]


def system_call_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Instructions of classic BPF over `struct seccomp_data`: number at 0, architecture at 4, low half of the first
    argument at 16. A jump counts the instructions it passes over."""
    column, architecture = ARCHITECTURES[machine]
    look, equal, at_least, any_bit = 0x20, 0x15, 0x35, 0x45

    def end(verdict: int) -> tuple[int, int, int, int]:
        return (0x06, 0, 0, verdict)

    def fail(number: int) -> tuple[int, int, int, int]:
        return end(0x00050000 | number)

    allow, kill = end(0x7FFF0000), end(0x80000000)
    made = [(look, 0, 0, 4), (equal, 1, 0, architecture), kill, (look, 0, 0, 0)]
    if machine == "x86_64":
        # The same calls under other numbers: x32.
        made += [(at_least, 0, 1, 0x40000000), fail(errno.EPERM)]
    for numbers in DENIED:
        made += [(equal, 0, 1, numbers[column]), fail(errno.EPERM)]
    # Its flags lie in memory, where no filter sees them: the C library then goes back to clone.
    made += [(equal, 0, 1, CLONE3[column]), fail(errno.ENOSYS)]
    made += [(equal, 0, 4, CLONE[column]), (look, 0, 0, 16), (any_bit, 0, 1, NAMESPACES), fail(errno.EPERM), allow]
    # Where no namespace ends it, it would outlive whoever asked.
    made += [(equal, 0, 4, PRCTL[column]), (look, 0, 0, 16), (equal, 0, 1, PDEATHSIG), fail(errno.EPERM), allow]
    made += [(equal, 0, len(FAMILIES) + 3, SOCKET[column]), (look, 0, 0, 16)]
    for at, family in enumerate(FAMILIES):
        last = at + 1 == len(FAMILIES)
        made.append((equal, len(FAMILIES) - 1 - at, 1 if last else 0, family))
    return [*made, allow, fail(errno.EAFNOSUPPORT), allow]


def filter_system_calls() -> bool:
    """For this process and all it starts, for good. False where the kernel or the machine has no filter."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        return False
    made = [Instruction(*fields) for fields in system_call_filter(machine)]
    program = Program(len(made), (Instruction * len(made))(*made))
    return libc.prctl(SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0) == 0


def limit(settings: dict[str, Any]) -> None:
    for name, value in (
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        (resource.RLIMIT_NOFILE, settings["open_files"]),
        (resource.RLIMIT_NPROC, settings["processes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        set_limit(name, value, value)
    # The soft limit can be caught, the hard one kills.
    set_limit(resource.RLIMIT_CPU, settings["cpu_s"], settings["cpu_s"] + 1)


def set_limit(name: int, soft: int, hard: int) -> None:
    """Never above what whoever asked has: raising that is not allowed."""
    top = resource.getrlimit(name)[1]
    if top != resource.RLIM_INFINITY:
        soft, hard = min(soft, top), min(hard, top)
    resource.setrlimit(name, (soft, hard))


def close_descriptors(keep: int | None) -> None:
    low = 3
    if keep is not None:
        os.closerange(3, keep)
        low = keep + 1
    os.closerange(low, 65536)


def execute(source: str, channel: int | None) -> NoReturn:
    """Run the source as `__main__` and end as a script would."""
    namespace = {"__name__": "__main__", "__builtins__": __builtins__, CHANNEL: channel}
    status = 0
    try:
        exec(compile(source, "<sandbox>", "exec"), namespace)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException as error:  # noqa: BLE001 - whatever it was, the process ends with it
        status = 1
        message = "".join(str(error)[:1000].splitlines()[:1])
        print(f"{type(error).__name__}: {message}", file=sys.stderr)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):
            pass
        os._exit(status if 0 <= status < NOT_BUILT else 1)


def wait_for(child: int, *, trusted: bool) -> int:
    """Reap until the child ends; its exit status, or 128 + the signal that ended it. What is not trusted cannot claim
    either that the walls were not built or that a signal ended it."""
    while True:
        pid, status = os.wait()
        if pid == child:
            if os.WIFSIGNALED(status):
                return 128 + os.WTERMSIG(status)
            code = os.WEXITSTATUS(status)
            return code if trusted or code < NOT_BUILT else 1


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = settings["channel"]
    die_with_parent(settings["parent"])
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    isolated = settings["isolated"]
    if isolated:
        try:
            enter_namespaces()
            close_kernel_doors()
            build_root(settings["visible"], settings["work_bytes"])
        except (NotBuilt, OSError) as error:
            print(error, file=sys.stderr)
            os._exit(NOT_BUILT)
    # The first child of a PID namespace is its init: with it, everything inside ends.
    first = os.getpid()
    init = os.fork()
    if init:
        close_descriptors(None)
        os._exit(wait_for(init, trusted=True))
    try:
        drop_privileges()
        die_with_parent(first)
        # Nobody else who is nobody may look into init or stop it.
        call("prctl", libc.prctl(SET_DUMPABLE, 0, 0, 0, 0))
        os.listdir(os.path.dirname(os.__file__))
    except (NotBuilt, OSError) as error:
        print(error, file=sys.stderr)
        os._exit(NOT_BUILT)
    init = os.getpid()
    worker = os.fork()
    if worker:
        close_descriptors(None)
        os._exit(wait_for(worker, trusted=False))
    die_with_parent(init)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    close_descriptors(channel)
    os.setsid()
    limit(settings)
    filter_system_calls()
    execute(source, channel)


if __name__ == "__main__":
    main()
