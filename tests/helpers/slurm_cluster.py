"""A real Slurm cluster of N nodes on one machine, for tests: munge, slurmctld, one slurmd per node.

The controller and every node are one set of Linux namespaces each (network, host name, mounts, processes):
each has its own host name, /etc/hosts, and address on a bridge inside the controller's network namespace. The
machine's network and files are not touched. The kernel kills the first process of each set when the test
process dies, and with it the whole set, so nothing remains, even after `kill -9`.

Needs root and the Debian packages slurm-wlm, munge and iproute2; `why_not()` reports what is missing.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

SUBNET = "10.99.0"
CONTROLLER = "login"
CONTROLLER_ADDRESS = f"{SUBNET}.250"
PROGRAMS = "slurmctld slurmd munged sbatch srun scontrol sinfo ip unshare nsenter setpriv".split()
PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"

# Process 1 of a namespace set: sets the name, mounts the hosts file, prints ready, then only reaps orphans.
# `os.wait` fails when there is no child at all, hence the short sleep; process 1 must never end.
INIT = """
import os, socket, subprocess, sys, time
name, hosts = sys.argv[1:]
socket.sethostname(name)
subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
print("ready", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.2)
"""

SLURM_CONF = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
TmpFS={folder}/spool
EnforcePartLimits=ALL
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-{nodes}] CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot boot a cluster, in one line; None when it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux and root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"not installed: {' '.join(missing)} (Debian: slurm-wlm munge iproute2)"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--mount-proc", "true"]
    if subprocess.run(probe, capture_output=True, env={"PATH": PATH}).returncode:
        return "may not make namespaces here (a container without CAP_SYS_ADMIN?)"
    return None


class SlurmCluster:
    """`with SlurmCluster(folder, nodes=4) as cluster: cluster.run("srun", "-N4", "hostname")`.

    gpus: devices that Slurm counts as GPUs, on every node; nothing can be computed on them. Jobs of the
    partition `urgent` preempt those of `test`, the default.
    """

    def __init__(self, folder: Path, nodes: int = 4, cpus: int = 1, gpus: int = 1):
        self.folder, self.nodes, self.cpus, self.gpus = Path(folder).resolve(), nodes, cpus, gpus
        if len(str(self.folder)) > 90:
            raise ValueError(f"{self.folder}: too long a path for munge's socket (at most 108 characters)")
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        # Inside a Slurm job, that job's identity must not reach the test cluster.
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self._init_pids: dict[str, int] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self, *command: str, cwd: Path | None = None, timeout: float = 300, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host. Returns stdout and stderr as text; a failure has them, too."""
        return self._run_on(CONTROLLER, *command, cwd=cwd, timeout=timeout, check=check)

    def on(self, node: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on a node; its mounts are visible to that node's jobs alone, and end with it."""
        return self._run_on(node, *command, check=check)

    def kill_node(self, node: str) -> None:
        """End a node and all its processes, like a power failure. Slurm is not notified."""
        holder = self._holders.pop(node)
        os.kill(self._init_pids.pop(node), signal.SIGKILL)
        holder.kill()
        holder.wait()
        holder.stdout.close()

    def start_node(self, node: str) -> None:
        """Start a killed node again, without its earlier mounts."""
        self._run_on(CONTROLLER, "ip", "link", "delete", f"to-{node}", check=False)
        self._make_host(node)
        self._connect(node, int(node.removeprefix("node")))
        self._run_on(node, "slurmd", "-N", node)
        self.wait_until_idle(120)

    def job(self, job_id: str) -> dict[str, str]:
        """The job's record (`JobState`, `ExitCode`, `NodeList`, `Restarts`, …), also after its end."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id).stdout
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait_for_job(self, job_id: str, timeout: float = 600) -> dict[str, str]:
        """Wait until the job has ended. Returns its record; raises TimeoutError after a while."""
        deadline = time.monotonic() + timeout
        while True:
            record = self.job(job_id)
            state = record["JobState"]
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
                return record
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} still {state} after {timeout:.0f} s\n{self.log_tails()}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Kill every process of the cluster; namespaces, mounts and network end with the last one."""
        for pid in self._init_pids.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for holder in self._holders.values():
            holder.kill()
            holder.wait()
            holder.stdout.close()
        self._holders.clear()
        self._init_pids.clear()

    def log_tails(self, lines: int = 15) -> str:
        """The last lines of every log file of the cluster, for error messages."""
        parts = []
        for path in sorted((self.folder / "log").glob("*.log")):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)

    def _start(self) -> None:
        names = [f"node{k}" for k in range(1, self.nodes + 1)]
        for sub in ("state", "log", *(f"spool/{name}" for name in names)):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        hosts = ["127.0.0.1 localhost", f"{CONTROLLER_ADDRESS} {CONTROLLER}"]
        hosts += [f"{SUBNET}.{k} node{k}" for k in range(1, self.nodes + 1)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        settings = {"controller": CONTROLLER, "address": CONTROLLER_ADDRESS, "folder": self.folder}
        configuration = SLURM_CONF.format(**settings, nodes=self.nodes, cpus=self.cpus, gpus=self.gpus)
        (self.folder / "slurm.conf").write_text(configuration)
        for k in range(self.gpus):
            os.mknod(self.folder / f"gpu{k}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n")

        for name in (CONTROLLER, *names):
            self._make_host(name)
        self._run_on(CONTROLLER, "ip", "link", "add", "br0", "type", "bridge")
        self._run_on(CONTROLLER, "ip", "address", "add", f"{CONTROLLER_ADDRESS}/24", "dev", "br0")
        self._run_on(CONTROLLER, "ip", "link", "set", "br0", "up")
        for k, name in enumerate(names, start=1):
            self._connect(name, k)

        # One munged serves all hosts: its socket is a file in a folder that all mount namespaces share.
        # `--force`: munged requires a socket that all users can reach; pytest's folders are private.
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid"}
        files |= {"seed-file": "munge.seed", "log-file": "log/munged.log"}
        flags = [f"--{flag}={self.folder / file}" for flag, file in files.items()]
        self._run_on(CONTROLLER, "munged", "--force", *flags)
        self._run_on(CONTROLLER, "slurmctld")
        for name in names:
            self._run_on(name, "slurmd", "-N", name)
        self.wait_until_idle(60)

    def _make_host(self, name: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL"]
        command += ["unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child=KILL"]
        command += ["--mount-proc", "--propagation", "private"]
        command += [sys.executable, "-c", INIT, name, str(self.folder / "hosts")]
        with open(self.folder / "log" / f"init.{name}.log", "w") as log:
            holder = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches pytest, which then stops the cluster in order
            )
        self._holders[name] = holder
        if holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name}: no namespaces\n{self.log_tails()}")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()
        self._init_pids[name] = int(children.split()[0])

    def _connect(self, name: str, k: int) -> None:
        """Give node k an `eth0`, attached to the bridge in the controller's network namespace."""
        pid = str(self._init_pids[name])
        link = ["ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", pid]
        # `netns` takes a PID of the machine, so only the network namespace is entered.
        nsenter = ["nsenter", "--target", str(self._init_pids[CONTROLLER]), "--net", "--"]
        subprocess.run([*nsenter, *link], check=True, env=self.environment, capture_output=True, text=True)
        self._run_on(CONTROLLER, "ip", "link", "set", f"to-{name}", "master", "br0", "up")
        self._run_on(name, "ip", "address", "add", f"{SUBNET}.{k}/24", "dev", "eth0")
        self._run_on(name, "ip", "link", "set", "eth0", "up")

    def _run_on(
        self, host: str, *command: str, cwd: Path | None = None, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "--target", str(self._init_pids[host])]
        enter += ["--net", "--uts", "--mount", "--pid", "--ipc"]
        # Entering a mount namespace moves to its root, so the working folder is set again.
        enter += ["--", "env", f"--chdir={cwd or self.folder}"]
        result = subprocess.run(
            [*enter, *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode:
            raise RuntimeError(
                f"{host}: {' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}\n"
                + self.log_tails()
            )
        return result

    def wait_until_idle(self, timeout: float = 300) -> None:
        """Wait until no job runs and every node is ready for one."""
        deadline = time.monotonic() + timeout
        while True:
            states = self.run(
                "sinfo", "--noheader", "--Node", "--partition=test", "--format=%T", check=False
            ).stdout.split()
            if states == ["idle"] * self.nodes:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes not idle but {states}\n{self.log_tails()}")
            time.sleep(0.2)
