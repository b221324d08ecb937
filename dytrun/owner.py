"""Who trains in a run's directory, who did before, and with what settings.

`.lock` there holds the owner's name and is locked by flock, which ends with the process, however that ends. Not every
shared file system carries flock to other machines: so the owner also touches the file now and then, as a sign of life.
`starts.jsonl` keeps a line for every start.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from dytrun import __version__, terminal
from dytrun.config import SCIENCE, RunConfig
from dytrun.errors import UserError, first_line
from dytrun.records import difference, whole_lines, write_json

_LOCK, _STARTS, _CONFIG = ".lock", "starts.jsonl", "config.json"
# How often a sign of life is given, and after how long without one a process on another machine is taken for dead.
_SIGN_S, _DEAD_S = 10.0, 30.0
# Somebody who only looks holds the lock for a moment.
_TRIES, _TRY_S = 6, 0.05
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
# What may differ between two starts of a run and is no news: it is about this command line.
_NO_NEWS = ("dry_run", "published")


@dataclass(frozen=True)
class Owner:
    """A process that trains, as the record in the run's directory names it."""

    host: str
    pid: int
    slurm_job: str | None
    """With the number in its array, if it is of one."""
    slurm_restarts: int
    started: str
    """ISO 8601, UTC."""
    dytrun: str
    """Version."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_before(self, other: "Owner") -> bool:
        """Whether the other one is the same SLURM job, put back into the queue since."""
        is_same_job = self.slurm_job is not None and self.slurm_job == other.slurm_job
        return is_same_job and self.slurm_restarts < other.slurm_restarts


@contextlib.contextmanager
def owned(config: RunConfig, **fields: Any) -> Iterator[None]:
    """Take the run's directory for this process, write the configuration there and note the start.

    Args:
        config: the run.
        fields: more of this start for starts.jsonl, plain JSON values.

    Raises:
        UserError: the directory cannot be written or is none of runs_dir's own, another process trains there, or it
            holds a run of another science.
    """
    directory = config.run_dir
    _check_place(config)
    with contextlib.ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((directory / _LOCK).open("a+"))
            before, has_flock = _last_owner(lock, directory, fcntl.LOCK_EX)
            changed = changes(config)
            _sign(lock, directory, has_flock)
            write_json(directory / _CONFIG, config.model_dump(mode="json"))
            record_start(directory, changed, **fields)
        except OSError as error:
            raise _unwritable(directory, error) from None
        if before is not None:
            terminal.line(f"{config.run_name}: took over from {before}, which is gone")
        if changed:
            said = ", ".join(f"{key} {_short(old)} → {_short(new)}" for key, (old, new) in changed.items())
            terminal.line(f"{config.run_name}: changed since the last start: {said}")
        over = threading.Event()
        alive = threading.Thread(target=_stay_alive, args=(lock, over), daemon=True)
        alive.start()
        try:
            yield
        finally:
            over.set()
            alive.join()
            with contextlib.suppress(OSError):
                lock.truncate(0)
                # A rank that is still on its way out may hold a copy of the open file.
                fcntl.flock(lock, fcntl.LOCK_UN)


def check(config: RunConfig) -> None:
    """Refuse what `owned` would refuse, early and without writing anything.

    Raises:
        UserError: as `owned`.
    """
    _check_place(config)
    try:
        with (config.run_dir / _LOCK).open() as lock:
            _last_owner(lock, config.run_dir, fcntl.LOCK_SH)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unwritable(config.run_dir, error) from None
    changes(config)


def changes(config: RunConfig) -> dict[str, list[Any]]:
    """Return {dotted key: [before, now]} of what is not as at the last start, none of it science.

    Raises:
        UserError: the science is not as it was, or config.json cannot be read.
    """
    path = config.run_dir / _CONFIG
    if not path.is_file():
        return {}
    try:
        there = json.loads(path.read_text())
        here = config.model_dump(mode="json")
        differs = _science_differs(there, config)
        found = difference(there, here)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); remove it, and the run goes on") from None
    if differs:
        said = ", ".join(f"{key} {_short(old)} -> {_short(new)}" for key, old, new in differs)
        raise UserError(f"{config.run_dir}: holds another run than its name says (there -> here: {said}); move it "
                        "away, and this one starts anew")  # fmt: skip
    return {key: [old, new] for key, old, new in found if key.partition(".")[0] not in _NO_NEWS}


def record_start(directory: Path, changed: Mapping[str, Any], **fields: Any) -> None:
    """Add a line on this start to starts.jsonl.

    Args:
        directory: the run's.
        changed: {dotted key: [before, now]}.
        fields: more of it, plain JSON values.
    """
    me = _me()
    start = {
        "started": me.started, "host": me.host, "pid": me.pid, "slurm_job": me.slurm_job,
        "command": os.environ.get("DYTRUN_COMMAND"), "changed": changed,
    } | fields  # fmt: skip
    with (directory / _STARTS).open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill cut short would spoil this one
        file.write(json.dumps(start).encode() + b"\n")


def amend_start(directory: Path, **fields: Any) -> None:
    """Add what is known later to the line of the last start."""
    known = starts(directory) or [{}]
    known[-1] |= fields
    partial = directory / f".{_STARTS}.partial"
    partial.write_text("".join(f"{json.dumps(start)}\n" for start in known))
    partial.replace(directory / _STARTS)


def starts(directory: Path) -> list[dict[str, Any]]:
    """Return what is known of every start of a run, the first one first."""
    return [json.loads(line) for line in whole_lines(directory / _STARTS)]


def at_work(directory: Path) -> Owner | None:
    """Return who trains in a directory now, as far as its lock, or else the sign of life, can tell; writes nothing."""
    try:
        with (directory / _LOCK).open() as lock:
            is_free, text = _flock(lock, fcntl.LOCK_SH, tries=1), lock.read()
            age_s = time.time() - os.fstat(lock.fileno()).st_mtime
        owner = Owner(**json.loads(text))
    except (OSError, ValueError, TypeError):  # nobody has been there, or whoever was has left in good order
        return None
    is_ours = is_free and owner.host == socket.gethostname()
    return owner if is_free is False or (not is_ours and age_s < _DEAD_S) else None


def relatives(config: RunConfig) -> str | None:
    """Say which unfinished run of the same model, norm, data and seed a new run is not; None if there is none."""
    if (config.run_dir / _CONFIG).is_file():
        return None
    prefix = config.run_name.removesuffix(config.science_id)
    found: list[tuple[float, str]] = []
    for path in Path(config.runs_dir).glob(f"{prefix}*/{_CONFIG}"):
        if not any(path.parent.glob("checkpoints/step-*")) or _has_ended(path.parent):
            continue
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, UserError):
            differs = _science_differs(json.loads(path.read_text()), config)
            said = ", ".join(f"{key} {_short(old)} there, {_short(new)} here" for key, old, new in differs)
            found.append((path.stat().st_mtime, f"{path.parent.name} is not finished, and differs: {said}"))
    if not found:
        return None
    more = f" (and {len(found) - 1} more such)" if len(found) > 1 else ""
    return f"this is a new run; {max(found)[1]}{more}"


def _check_place(config: RunConfig) -> None:
    """Refuse a directory that is not where its name says: a link, planted or left, would let a run write elsewhere."""
    if config.run_dir.resolve() != Path(config.runs_dir).resolve() / config.run_name:
        raise UserError(f"{config.run_dir}: leads to {config.run_dir.resolve()}, out of runs_dir; remove the link")


def _last_owner(lock: IO[str], directory: Path, how: int) -> tuple[Owner | None, bool]:
    """Return who was there last and has left no word, and whether the lock could be taken here at all.

    Raises:
        UserError: that process is there now.
    """
    is_free = _flock(lock, how)
    lock.seek(0)
    text = lock.read()
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError):
        owner = None
    if is_free is False:
        since = f", since {owner.started}" if owner else ""
        raise UserError(f"{directory}: {owner or 'another process'} trains there{since}; wait for it, or stop it")
    me = _me()
    if owner is None or (is_free and owner.host == me.host) or owner.is_before(me):
        return owner, bool(is_free)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".now-") as now:  # by the clock of whoever keeps the files
        age_s = os.fstat(now.fileno()).st_mtime - os.fstat(lock.fileno()).st_mtime
    if age_s < _DEAD_S:
        raise UserError(
            f"{directory}: {owner} trains there, since {owner.started}; its last sign of life is {max(age_s, 0):.0f} s "
            f"old; wait for it, or stop it (it counts as gone after {_DEAD_S:.0f} s without one)"
        )
    return owner, bool(is_free)


def _flock(lock: IO[str], how: int, tries: int = _TRIES) -> bool | None:
    """Lock a file without waiting for one who stays; None where the file system knows no locks."""
    for attempt in range(tries):
        if attempt:
            time.sleep(_TRY_S)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return None
            raise
        else:
            return True
    return False


def _sign(lock: IO[str], directory: Path, has_flock: bool) -> None:
    """Write who the owner is."""
    text = json.dumps(asdict(_me())) + "\n"
    lock.truncate(0)
    lock.write(text)
    lock.flush()
    if has_flock:
        return
    # Of two that sign at the same time the one that wrote last is the owner.
    time.sleep(_TRIES * _TRY_S)
    if (directory / _LOCK).read_text() != text:
        raise UserError(f"{directory}: another process has just begun to train there; wait for it, or stop it")


def _stay_alive(lock: IO[str], over: threading.Event) -> None:
    while not over.wait(_SIGN_S):
        with contextlib.suppress(OSError):  # a disk that is away for a moment
            os.utime(lock.fileno())


def _me() -> Owner:
    env = os.environ
    job = env.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return Owner(socket.gethostname(), os.getpid(), job, int(restarts), started, __version__)


def _science_differs(there: Mapping[str, Any], config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, there, here) wherever the science of a config.json is not ours; seeds count here."""
    here = config.model_dump(mode="json")
    keys = [*SCIENCE, "init_part"]
    old, new = ({key: values.get(key) for key in keys} for values in (there, here))
    data, root = old["data"], (new["data"] or {}).get("root")
    if isinstance(data, dict) and not Path(str(data.get("root"))).is_absolute():
        old["data"] = data | {"root": root}  # it was said from another place, and cannot be told apart
    try:
        # What is no science of this run, such as how often it is saved, has no say, and may be of another version.
        other = RunConfig.model_validate(here | old | {"init_from": _same_file(there, config)})
        pair = other.science(), config.science()
    except ValidationError:
        pair = old, new
    seeds = [("seed", pair[0]["seed"], pair[1]["seed"])] if pair[0]["seed"] != pair[1]["seed"] else []
    return seeds + difference(*pair)


def _same_file(there: Mapping[str, Any], config: RunConfig) -> str | None:
    """Return the weights that a config.json starts from; ours, if they are no longer where they were."""
    path = there.get("init_from")
    return path if path is None or config.init_from is None or os.path.isfile(path) else config.init_from


def _has_ended(directory: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return json.loads((directory / "result.json").read_text()).get("status") in ("finished", "diverged")
    return False


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(f"runs_dir: {directory} cannot be written ({error.strerror}); choose another")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
