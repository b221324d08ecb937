"""A real SLURM of several nodes on this machine, for tests: up in a second, down without a trace.

Everything of it, munge with a key of its own included, lives in one directory and on free ports, so that it meets
neither another cluster nor a SLURM that the machine already has. It needs root and, on Debian or Ubuntu,

    apt-get install --no-install-recommends slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge

`python tests/slurm/cluster.py DIR` keeps one up to try things by hand.
"""

import argparse
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

PROGRAMS = ("slurmctld", "slurmd", "munged", "munge", "scontrol", "sinfo", "squeue", "sbatch", "srun", "setpriv")
HOSTS = Path("/etc/hosts")
OURS = "# dytrun test cluster of process"  # in each of our lines in HOSTS, followed by the process id and a directory
UP_WITHIN_S = IDLE_WITHIN_S = 60
PORTS = range(20_000, 32_000)  # below what the kernel gives to outgoing connections: a dead node's port stays free

# Credentials live five seconds because a requeued job waits for them to expire (the default is two minutes; SLURM
# ignores less than five). The scheduler's periods are as short, and a silent node is given up after ten seconds.
CONF = """\
ClusterName=dytrun
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
JobRequeue=1
KillWait=10
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class ClusterError(RuntimeError):
    """The cluster, or a command that was sent to it, did not do what a test relies on."""


def unavailable() -> str:
    """Say in one line why no cluster can be had on this machine; empty if it can."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    if lost := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"a SLURM of our own needs {', '.join(lost)}: see the top of tests/slurm/cluster.py"
    return ""


class Cluster:
    """Nodes n1, n2, … of `cpus` cores and `gpus` pretended GPUs, as a context manager.

    Partition `low` is the default and gives way to `high`: its jobs are warned, have five seconds, and are requeued.
    `preempt_user_signal` is the site's choice whether the warning is the signal that the job asked for with
    `--signal`, or SIGTERM alone.
    """

    def __init__(
        self, directory: Path, nodes: int = 2, cpus: int = 2, gpus: int = 0, preempt_user_signal: bool = True
    ) -> None:
        self.directory = directory.resolve()
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.cpus, self.gpus, self.preempt_user_signal = cpus, gpus, preempt_user_signal
        self.env = {"SLURM_CONF": str(self.directory / "slurm.conf"), "GLOO_SOCKET_IFNAME": "lo"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._hosts = ""

    def __enter__(self) -> Self:
        if reason := unavailable():
            raise ClusterError(reason)
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._down()

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Return what a SLURM command prints; a failure is an error that shows what it said."""
        done = subprocess.run(command, env=self._environ(), capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self) -> dict[str, dict[str, str]]:
        """Return every job that the controller remembers, by its id: SLURM's own fields and spelling."""
        records = map(_fields, self.run("scontrol", "-o", "show", "job").splitlines())
        return {record["JobId"]: record for record in records if "JobId" in record}

    def wait_for(self, job_id: str, states: str | Collection[str], timeout_s: float = 120) -> dict[str, str]:
        """Return the job's record as soon as its JobState is one of `states`."""
        wanted = {states} if isinstance(states, str) else set(states)
        record: dict[str, str] = {}

        def reached() -> bool:
            record.clear()
            record.update(self.jobs().get(job_id, {}))
            return record.get("JobState") in wanted

        self._until(reached, timeout_s, lambda: f"job {job_id} is not {' or '.join(sorted(wanted))}: {record}")
        return record

    def kill_node(self, name: str) -> None:
        """Kill all that runs on a node at once, as if its power had failed.

        SLURM finds out after about 25 s, declares the node down, and requeues its jobs.
        """
        _kill_all(lambda: self._processes(name))
        self._daemons.pop(name).wait()

    def start_node(self, name: str) -> None:
        """Start a node after `kill_node` and wait until the controller has it back.

        Not before it was found to be down: a node that is back too soon was never away, and a job that had tasks but
        not its batch script there is believed to run for ever.
        """
        self._start(name, "slurmd", "-D", "-N", name, "-f", self.env["SLURM_CONF"])
        self._until(lambda: self._answers(name), UP_WITHIN_S, lambda: f"node {name} does not answer")

    def kill_controller(self) -> None:
        """Kill slurmctld at once; jobs go on, and no command is answered."""
        daemon = self._daemons.pop("slurmctld")
        daemon.kill()
        daemon.wait()

    def start_controller(self) -> None:
        """Start slurmctld after `kill_controller`, with what it knew, and wait until it answers."""
        self._start("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        self._until(lambda: bool(self._sinfo("-h")), UP_WITHIN_S, lambda: "slurmctld does not answer")

    def _up(self) -> None:
        for folder in ("state", "spool", "log"):
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
        self._start_munge()
        self._configure()
        self._hosts = _name_nodes(self.nodes, self.directory)
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"])
        for name in self.nodes:
            self._start(name, "slurmd", "-D", "-N", name, "-f", self.env["SLURM_CONF"])
        self._until(self._idle, IDLE_WITHIN_S, lambda: "the nodes are not idle")

    def _down(self) -> None:
        """Cut the power. Nothing of this cluster will be used again, so nothing is asked to end well."""
        try:
            _kill_all(self._processes)
            for daemon in self._daemons.values():
                daemon.kill()
                daemon.wait()
            self._daemons.clear()
        finally:
            _forget_nodes(self._hosts)
            self._hosts = ""

    def _start_munge(self) -> None:
        """Start an own munge: the machine's may be absent, and its key is not ours to use.

        `--force`, because it warns of a directory that other users cannot enter, which is what we want.
        """
        where = self.directory / "munge"
        if len(f"{where}.socket") > 100 or re.search(r"[\s#%,=]", str(where)):
            raise ClusterError(f"{where}.socket: too long a path for a socket, or not one for slurm.conf")
        key = where.with_suffix(".key")
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "munged.pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={where}.{suffix}" for option, suffix in files.items()]
        self._start("munged", "munged", "--foreground", "--force", *options)
        probe = ["munge", "-n", "-S", f"{where}.socket"]
        self._until(
            lambda: subprocess.run(probe, capture_output=True).returncode == 0,
            UP_WITHIN_S,
            lambda: "munge does not answer",
        )

    def _configure(self) -> None:
        """Write slurm.conf and, for pretended GPUs, gres.conf.

        SLURM counts the files of a GPU and sets CUDA_VISIBLE_DEVICES by the number in their names, if they are
        devices: here the null device under other names.
        """
        port, *ports = _free_ports(1 + len(self.nodes))
        conf = CONF.format(port=port, directory=self.directory)
        if self.preempt_user_signal:
            conf += "SlurmctldParameters=preempt_send_user_signal\n"
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        host = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs={self.cpus} RealMemory=4000 State=UNKNOWN"
        for name, port in zip(self.nodes, ports, strict=True):
            conf += f"NodeName={name} Port={port} {host} {gres}\n"
        if self.gpus:
            conf += "GresTypes=gpu\n"
            for i in range(self.gpus):
                with suppress(FileExistsError):
                    os.mknod(self.directory / f"nvidia{i}", 0o600 | 0o020000, os.makedev(1, 3))
            names = f"NodeName=n[1-{len(self.nodes)}]"
            (self.directory / "gres.conf").write_text(
                f"{names} Name=gpu File={self.directory}/nvidia[0-{self.gpus - 1}]\n"
            )
        Path(self.env["SLURM_CONF"]).write_text(conf)

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon that ends with this process, however this process ends, but not by its Ctrl-C."""
        with (self.directory / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self._environ() | {"DYTRUN_CLUSTER_NODE": name},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _environ(self) -> dict[str, str]:
        """Return our environment for the cluster, without a SLURM job that we may ourselves be part of."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_"))}
        return mine | self.env

    def _processes(self, node: str = "") -> Iterator[int]:
        """Find what runs in the cluster, or on one node of it, by the environment that all of it inherits.

        The daemons were given DYTRUN_CLUSTER_NODE; SLURM gives each task SLURMD_NODENAME. Parents say less: a step's
        daemon has left its own. They do for a process that shows a title, which takes the place of its environment.
        A shell that only talks to the cluster has neither variable and is let live.
        """
        conf = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        places = [f"{key}={node}".encode() for key in ("DYTRUN_CLUSTER_NODE", "SLURMD_NODENAME")]
        parents: dict[int, int] = {}
        here: set[int] = set()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                environ = (process / "environ").read_bytes().split(b"\0")
                if conf in environ and any(v == place if node else v.startswith(place) for v in environ
                                           for place in places):  # fmt: skip
                    here.add(int(process.name))
        while more := {pid for pid, parent in parents.items() if parent in here} - here:
            here |= more
        yield from here - {os.getpid()}

    def _idle(self) -> bool:
        return sorted(self._sinfo("-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split()) == sorted(self.nodes)

    def _answers(self, name: str) -> bool:
        return self._sinfo("-h", "-p", "low", "-n", name, "-o", "%t").strip() in {"idle", "mix", "alloc", "comp"}

    def _sinfo(self, *args: str) -> str:
        """Return what sinfo prints, which is nothing as long as the controller is not up."""
        return subprocess.run(["sinfo", *args], env=self._environ(), capture_output=True, text=True).stdout

    def _until(self, reached: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
        """Wait for something, and give up with the last words of all logs; at once if a daemon has died."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead:
                raise ClusterError(f"{', '.join(dead)} has ended by itself{self._last_words()}")
            if time.monotonic() > deadline:
                raise ClusterError(f"{what()}, after {timeout_s:g} s{self._last_words()}")
            time.sleep(0.05)

    def _last_words(self, lines: int = 15) -> str:
        logs = [*sorted((self.directory / "log").glob("*")), self.directory / "munge.log"]
        tails = {log: log.read_text(errors="replace").splitlines()[-lines:] for log in logs if log.exists()}
        return "".join(f"\n--- {log.name}\n" + "\n".join(tail) for log, tail in tails.items() if tail)


def _fields(line: str) -> dict[str, str]:
    """Parse a line of `scontrol -o`: KEY=VALUE, where a value may contain spaces and equal signs."""
    fields: dict[str, str] = {}
    for field in re.split(r" (?=[A-Z][\w/:]*=)", line):
        key, _, value = field.partition("=")
        fields.setdefault(key, value.strip())
    return fields


def _free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    found: list[int] = []
    for port in random.sample(PORTS, 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"no {count} free ports between {PORTS.start} and {PORTS.stop}")


def _kill_all(find: Callable[[], Iterator[int]]) -> None:
    """Kill all that is found until nothing is: what is being killed may still start something."""
    deadline = time.monotonic() + 10
    while found := [pid for pid in find() if _alive(pid)]:
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {found} cannot be killed")
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Tell whether a process runs; one that is dead but not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _name_nodes(names: Collection[str], directory: Path) -> str:
    """Make the nodes' names known, since MASTER_ADDR is one of them. Returns the text to take away later."""
    lines = "".join(f"127.0.0.1 {name} {OURS} {os.getpid()} {directory}\n" for name in names)
    with _hosts() as file:
        text = _without_leftovers(file.read())
        ours = lines if text.endswith("\n") or not text else "\n" + lines
        _rewrite(file, text + ours)
    return ours


def _forget_nodes(ours: str) -> None:
    with _hosts() as file:
        _rewrite(file, file.read().replace(ours, "", 1))


def _without_leftovers(text: str) -> str:
    """Drop the lines of clusters whose process was killed before it could."""
    kept = []
    for line in text.splitlines(keepends=True):
        _, ours, owner = line.partition(OURS)
        if not ours or _alive(int(owner.split()[0])):
            kept.append(line)
    return "".join(kept)


def _hosts() -> TextIO:
    """Open /etc/hosts for this process alone."""
    file = HOSTS.open("r+")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _rewrite(file: TextIO, text: str) -> None:
    """Write in place: in a container the file is a mount and cannot be replaced."""
    file.seek(0)
    file.write(text)
    file.truncate()


def main() -> None:
    """Keep a cluster up until Ctrl-C, SIGTERM or the end of standard input."""
    parser = argparse.ArgumentParser(description="A SLURM of several nodes on this machine, until Ctrl-C.")
    parser.add_argument("directory", type=Path, help="for its configuration, state and logs")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2, help="of each node")
    parser.add_argument("--gpus", type=int, default=0, help="of each node; pretended")
    parser.add_argument("--term-only", action="store_true", help="warn a preempted job by SIGTERM alone")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    cluster = Cluster(args.directory, args.nodes, args.cpus, args.gpus, preempt_user_signal=not args.term_only)
    with suppress(KeyboardInterrupt), cluster:
        sys.stdout.write("".join(f"export {key}={value}\n" for key, value in cluster.env.items()))
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
