"""What is locked in stays in: each attack of a hostile completion is tried, and does not succeed."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlhf_nb.errors import UnavailableError
from rlhf_nb.rewards import jail, sandbox
from rlhf_nb.rewards.sandbox import Jail, Limits

SHORT = Limits(wall_s=20.0, cpu_s=10)

try:
    WHY_NOT = sandbox.require("isolated") and ""
except UnavailableError as refusal:
    WHY_NOT = str(refusal)
UNDER_CI = os.environ.get("CI") == "true"
isolated = pytest.mark.skipif(bool(WHY_NOT) and not UNDER_CI, reason=WHY_NOT)  # a green CI means that it ran


def run(source: str, limits: Limits = SHORT) -> sandbox.Outcome:
    return sandbox.run(textwrap.dedent(source), limits=limits)


def jails(parent: int | None = None) -> list[psutil.Process]:
    """Processes of the sandboxes that a process asked for, this one or another: tests beside this one have theirs."""
    asked = f'"parent": {parent or os.getpid()}, '
    lines = ((p, p.info["cmdline"] or [""]) for p in psutil.process_iter(["cmdline"]))
    return [p for p, line in lines if str(sandbox.JAIL) in line and asked in line[-1]]


def left_running(parent: int | None = None) -> list[psutil.Process]:
    """What does not end by itself; ended here."""
    deadline = time.monotonic() + 20
    while (left := jails(parent)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        process.kill()
    return left


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    assert left_running() == []


@isolated
def test_a_script_runs_with_an_empty_environment_in_an_empty_directory():
    done = run("import os, math; print(os.getcwd(), os.listdir(), sorted(os.environ), math.sqrt(4))")
    assert (done.ended, done.status) == ("itself", 0)
    # LC_CTYPE is the interpreter's own, set where an environment names no locale.
    assert done.output.decode().strip() in ("/work [] ['LC_CTYPE'] 2.0", "/work [] [] 2.0")


@isolated
@pytest.mark.parametrize(
    "source",
    ["while True: pass", "import time; time.sleep(60)", "import os; os.close(1); os.close(2)\nwhile True: pass"],
)
def test_an_endless_loop_ends_at_its_limit(source):
    done = run(source, Limits(wall_s=1.0, cpu_s=60))
    assert done.ended == "time" and done.seconds < 15


@isolated
def test_cpu_time_ends_a_loop_that_ignores_the_signal():
    done = run("import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", Limits(60.0, cpu_s=1))
    assert done.ended == "killed"


@isolated
def test_a_fork_bomb_gets_no_further_than_its_processes():
    """Root too: RLIMIT_NPROC does not bind root, and binds the nobody that it is inside."""
    done = run(
        """
        import os, time
        made = 0
        try:
            while made < 500:
                if os.fork() == 0:
                    time.sleep(60)
                made += 1
        except OSError:
            pass
        print(made)
        """
    )
    assert done.ended == "itself" and 0 < int(done.output) <= SHORT.processes


@isolated
def test_threads_count_as_processes():
    start = "threading.stack_size(65536)\nfor _ in range(20): threading.Thread(target=time.sleep, args=(9,)).start()"
    done = run(f"import threading, time\n{start}")
    assert b"can't start new thread" in done.output


@isolated
def test_memory_and_file_bombs_end_at_their_limits():
    assert b"MemoryError" in run("x = bytearray(1 << 34)").output
    assert b"MemoryError" in run("x = []\nwhile True: x.append(bytearray(1 << 20))").output
    big = "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))"
    assert b"File too large" in run(big).output or run(big).ended == "killed"
    many = "i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(1 << 20)); i += 1"
    assert b"No space left on device" in run(many).output


@isolated
def test_shared_memory_that_no_limit_counts_cannot_be_had():
    done = run("import ctypes; print(ctypes.CDLL(None).shmget(0, 1 << 20, 0o1666))")
    assert done.output.strip() == b"-1"


@isolated
def test_what_is_outside_can_neither_be_read_nor_written(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    at_home = Path.home()
    done = run(
        f"""
        import os
        for act in (
            lambda: open({str(secret)!r}).read(),
            lambda: open({str(secret)!r}, "w"),
            lambda: open("/etc/passwd").read(),
            lambda: os.listdir({str(tmp_path)!r}),
            lambda: os.listdir("/proc"),
            lambda: open("/proc/1/environ").read(),
            lambda: open("/usr/mine", "w"),
            lambda: open("/mine", "w"),
            lambda: os.listdir({str(at_home / ".ssh")!r}),
            lambda: os.listdir({os.getcwd()!r}),
        ):
            try:
                print("reached", str(act())[:50])
            except OSError:
                print("refused")
        """
    )
    assert done.output.decode().split() == ["refused"] * 10
    assert secret.read_text() == "hunter2"


def test_an_interpreter_that_is_installed_in_a_home_shows_only_its_libraries(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_exec_prefix", "/")
    shown = sandbox._visible()
    assert str(tmp_path / "lib") in shown and not {str(tmp_path), "/"} & set(shown)


@isolated
def test_limits_below_ours_stay_in_force():
    code = 'from rlhf_nb.rewards import sandbox as s; print(s.run(\'open("f", "wb").write(bytes(50000)); print(1)\'))'
    lowered = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (4096, 4096)); {code}"
    done = subprocess.run([sys.executable, "-c", lowered], capture_output=True, text=True)
    assert "File too large" in done.stdout, done.stderr


@isolated
def test_there_is_no_network_not_even_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = run(f"import socket; socket.create_connection({server.getsockname()!r}, timeout=1); print('reached')")
        assert b"Network is unreachable" in done.output
    # Abstract Unix sockets belong to the network namespace, and stand in no directory.
    with socket.socket(socket.AF_UNIX) as server:
        name = f"\0rlhf-{os.getpid()}"
        server.bind(name)
        server.listen()
        done = run(f"import socket; socket.socket(socket.AF_UNIX).connect({name!r}); print('reached')")
        assert b"ConnectionRefusedError" in done.output


@isolated
def test_huge_output_is_cut_and_ends_the_run():
    done = run("while True: print('x' * 1000)")
    assert done.ended == "output" and len(done.output) == SHORT.output_bytes


@isolated
def test_a_daemon_dies_with_the_run():
    done = run(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        """
    )
    assert (done.ended, done.status) == ("itself", 0)  # the fixture sees that nothing is left


@isolated
def test_signals_reach_nobody_outside():
    done = run(
        f"""
        import os, signal
        for pid in ({os.getpid()}, {os.getppid()}, os.getppid(), 1, -1):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        print("still here")
        """
    )
    assert done.output.strip() == b"still here"


@isolated
def test_privileges_cannot_be_had_back():
    done = run(
        """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print(os.getuid(), libc.unshare(0x10000000), libc.setuid(0), libc.mount(b"none", b"/work", b"tmpfs", 0, None))
        """
    )
    assert done.output.split() == [b"65534", b"-1", b"-1", b"-1"]


def verdict(machine: str, number: int, argument: int = 0, architecture: int | None = None) -> int:
    """What the filter says of a system call, by the rules of classic BPF."""
    given = {0: number, 4: jail.ARCHITECTURES[machine][1] if architecture is None else architecture, 16: argument}
    tests = {0x15: lambda a, k: a == k, 0x35: lambda a, k: a >= k, 0x45: lambda a, k: bool(a & k)}
    program, at, looked = jail.system_call_filter(machine), 0, 0
    while True:
        code, yes, no, k = program[at]
        if code == 0x06:
            return k
        if code == 0x20:
            looked = given[k]
        at += 1 + ((yes if tests[code](looked, k) else no) if code in tests else 0)


@pytest.mark.parametrize("machine", jail.ARCHITECTURES)
def test_the_filter_refuses_what_is_listed_and_nothing_else(machine):
    column = jail.ARCHITECTURES[machine][0]
    allow, kill, no = 0x7FFF0000, 0x80000000, 0x00050000
    special = {numbers[column] for numbers in (jail.CLONE, jail.CLONE3, jail.SOCKET, jail.PRCTL)}
    denied = {numbers[column] for numbers in jail.DENIED}
    for number in range(600):
        if number not in special:
            assert verdict(machine, number) == (no | errno.EPERM if number in denied else allow)
    fork, threads = 17, 0x3D0F00
    assert [verdict(machine, jail.CLONE[column], flags) for flags in (fork, threads)] == [allow, allow]
    for flag in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000):
        assert verdict(machine, jail.CLONE[column], fork | flag) == no | errno.EPERM
    assert verdict(machine, jail.CLONE3[column]) == no | errno.ENOSYS
    options = {option: verdict(machine, jail.PRCTL[column], option) for option in range(100)}
    assert {option for option, said in options.items() if said != allow} == {jail.PDEATHSIG}
    assert options[jail.PDEATHSIG] == no | errno.EPERM
    families = {family: verdict(machine, jail.SOCKET[column], family) for family in range(50)}
    assert {family for family, said in families.items() if said == allow} == {1, 2, 10}
    assert set(families.values()) == {allow, no | errno.EAFNOSUPPORT}
    assert verdict(machine, 39, architecture=3) == kill, "a 32-bit call has other numbers"
    if machine == "x86_64":
        assert verdict(machine, 0x40000000 + 39) == no | errno.EPERM


@isolated
@pytest.mark.skipif("a seccomp filter" not in (WHY_NOT or sandbox.require("isolated")), reason="no seccomp here")
def test_the_kernel_holds_a_run_to_the_filter():
    """Each of these is allowed to a process without privilege: to be traced, its personality, a new name space of
    users, sockets of other families."""
    column = jail.ARCHITECTURES[os.uname().machine][0]
    trace, personality = jail.DENIED[0][column], next(n[column] for n in jail.DENIED if n == (135, 92))
    done = run(f"""
        import ctypes, errno, os, socket, threading
        libc = ctypes.CDLL(None, use_errno=True)
        for number, argument in (({trace}, 0), ({personality}, 0xFFFFFFFF), ({jail.CLONE[column]}, 0x10000000 | 17)):
            print(libc.syscall(number, argument, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
        for family in (socket.AF_NETLINK, socket.AF_VSOCK):
            try:
                socket.socket(family, socket.SOCK_RAW if family == socket.AF_NETLINK else socket.SOCK_STREAM)
            except OSError as error:
                print(errno.errorcode[error.errno])
        thread = threading.Thread(target=print, args=("a thread",))
        thread.start()
        thread.join()
        socket.socketpair()
    """)
    said = done.output.decode().split("\n")
    assert said[:3] == ["-1 EPERM"] * 3 and said[3:5] == ["EAFNOSUPPORT"] * 2 and said[5] == "a thread", said
    assert done.status == 0


@isolated
def test_nothing_is_inherited_but_the_channel(tmp_path):
    kept = (tmp_path / "open.txt").open("w")
    os.set_inheritable(kept.fileno(), True)
    here, there = socket.socketpair()
    source = """
import os
live = []
for fd in range(256):
    try:
        live.append((os.fstat(fd), fd)[1])
    except OSError:
        pass
print(live, RLHF_CHANNEL)
"""
    with here, there, Jail(source, channel=there) as jail:
        assert jail.wait().output.decode().strip() == f"[0, 1, 2, {there.fileno()}] {there.fileno()}"
    kept.close()


PYTHON = sys.executable


def outliving(level: sandbox.Level) -> list[psutil.Process]:
    """What is left of a run that only waits when the process that asked for it is killed."""
    code = f"""
import sys
from rlhf_nb.rewards import sandbox
sys.executable = {sys.executable!r}
sandbox.require({level!r})
print("found out", flush=True)
sandbox.run("import time; time.sleep(600)", level={level!r}, limits=sandbox.Limits(wall_s=600))
"""
    asker = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE)
    assert asker.stdout is not None and asker.stdout.readline() == b"found out\n"
    deadline = time.monotonic() + 60
    while len(jails(asker.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(jails(asker.pid)) == 3, "the first process, init and the worker"
    asker.kill()
    asker.communicate()
    return left_running(asker.pid)


@isolated
def test_it_dies_with_whoever_asked():
    assert outliving("isolated") == []


@isolated
def test_a_run_cannot_say_that_it_was_not_run():
    assert run(f"import os; os._exit({sandbox.NOT_BUILT})").status == 1
    assert run("import os; os._exit(137)").ended == "itself"


@isolated
def test_many_run_at_once():
    outcomes: list[sandbox.Outcome] = []
    source = "import threading, time; threading.Thread(target=time.sleep, args=(0.2,)).start(); print(1)"
    threads = [threading.Thread(target=lambda: outcomes.append(run(source, Limits()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(o.status, o.output.strip()) for o in outcomes] == [(0, b"1")] * 8


def test_code_is_refused_where_it_cannot_be_isolated(monkeypatch):
    def missing(level: str) -> str:
        return "unshare: Operation not permitted" if level == "isolated" else ""

    monkeypatch.setattr(sandbox, "_missing", missing)
    with pytest.raises(UnavailableError) as refused:
        sandbox.run("print(1)")
    assert str(refused.value).startswith('sandbox="isolated": unshare: Operation not permitted; allow ')
    assert 'sandbox="weak"' in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux")
def test_a_wall_that_cannot_be_built_is_named(monkeypatch):
    sandbox._probed.cache_clear()
    monkeypatch.setattr(sandbox, "_visible", lambda: ["/no-such-directory"])
    try:
        with pytest.raises(UnavailableError, match=r'^sandbox="isolated": .+: .+; allow unprivileged user namespaces'):
            sandbox.require("isolated")
    finally:
        sandbox._probed.cache_clear()


@isolated
def test_a_machine_too_busy_to_find_out_is_asked_again(monkeypatch):
    sandbox._probed.cache_clear()
    with monkeypatch.context() as busy:
        busy.setattr(sandbox, "PROBE_S", 0.0)
        with pytest.raises(UnavailableError, match=r'^sandbox="isolated": .* within 0 s .* busy; try again$'):
            sandbox.require("isolated")
    assert sandbox.require("isolated").startswith("isolated: ")


@pytest.fixture
def weak(monkeypatch):
    """An interpreter that every user may read: root's own may be in its home."""
    if os.getuid() == 0 and Path("/usr/bin/python3").exists():
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    sandbox._probed.cache_clear()
    try:
        sandbox.require("weak")
    except UnavailableError as refusal:
        if UNDER_CI:
            raise
        pytest.skip(str(refusal))
    yield
    sandbox._probed.cache_clear()


def test_weak_keeps_the_limits_and_starts_no_process(weak):
    def weakly(source: str) -> sandbox.Outcome:
        return sandbox.run(source, level="weak", limits=Limits(wall_s=20.0, cpu_s=2))

    assert weakly("import os; print(sorted(set(os.environ) - {'LC_CTYPE'}), os.getuid() != 0)").output == b"[] True\n"
    assert weakly("while True: pass").ended in ("time", "killed")
    assert b"Resource temporarily unavailable" in weakly("import os\nwhile True: os.fork()").output
    assert b"MemoryError" in weakly("x = bytearray(1 << 34)").output
    here = weakly("import os; open('mine', 'w').write('x'); print(os.getcwd())").output.decode().strip()
    assert here.startswith("/") and not Path(here).exists()


def test_weak_ends_what_only_waits_when_its_time_is_up(weak):
    done = sandbox.run("import time; time.sleep(600)", level="weak", limits=Limits(wall_s=2.0))
    assert done.ended == "time" and left_running() == []


def test_weak_dies_with_whoever_asked(weak):
    assert outliving("weak") == []


def test_weak_cannot_undo_its_end_and_starts_no_process_whoever_asks(weak):
    """Root becomes a nobody who runs nothing else, so a limit above 0 would leave it some."""
    done = sandbox.run("import os; os.fork()", level="weak")
    assert b"Resource temporarily unavailable" in done.output
    if "a seccomp filter" in sandbox.require("weak"):
        off = "import ctypes; libc = ctypes.CDLL(None); print(libc.prctl(1, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0))"
        assert sandbox.run(off, level="weak").output == b"-1 2\n"
