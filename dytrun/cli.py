"""The command line: verb, compose, validate, go; what is said of errors, and the exit code.

Nothing heavy is imported before a configuration is composed and valid.
"""

import atexit
import contextlib
import itertools
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dytrun import __version__, compose, guard, stop
from dytrun.errors import RunError, UserError, first_line
from dytrun.task import DONE, FAILED, WRONG_INPUT, Outcome, Task, exit_code, outcomes
from dytrun.usage import (
    COMMANDS,
    CONF,
    DATA,
    command_help,
    config_dir_of,
    config_name,
    flag_name,
    is_bare,
    usage,
)

# Flags with which Hydra shows something instead of running.
_COMPLETE = ("--shell-completion", "-sc")
_SHOW = ("--cfg", "-c", "--info", "-i", "--hydra-help", *_COMPLETE)
# Flags whose value is the next argument.
_VALUED = ("--cfg", "-c", "--config-dir", "-cd", "--package", "-p")
# No more of a command line than this is noted in starts.jsonl.
_COMMAND_CHARS = 20_000


def main() -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 2 wrong input, 75 stopped."""
    try:
        guard.check_arguments(sys.argv[1:])
        # Hydra makes its own of sys.argv, and jobs elsewhere have another: starts.jsonl gets it from here.
        os.environ["DYTRUN_COMMAND"] = shlex.join(["dytrun", *sys.argv[1:]])[:_COMMAND_CHARS]
        # What is not training stops at once, and leaves nothing; training has its own way (`stop.passed_on`).
        with stop.as_interrupt():
            return _main(sys.argv[1:])
    except UserError as error:
        for problem in error.problems:
            print(f"dytrun: {guard.printable(problem)}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # dytrun … | head
        sys.stdout = None
        return DONE
    except KeyboardInterrupt:
        print("dytrun: stopped", file=sys.stderr)
        _leave(stop.STOPPED)


def _leave(code: int) -> NoReturn:
    """Exit now, after what is registered for the end.

    Where an interrupt has come within an exec() (of a namedtuple, of an import), CPython run by `-m` would kill itself
    by SIGINT at its end, although the interrupt was caught, and the exit code would be another.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _main(args: list[str]) -> int:
    if args[:1] in (["--shell-completion"], ["-sc"]):
        return _complete(args) if any(arg.startswith("query=") for arg in args) else _show("train", args)
    if not args or args[0] in ("--help", "-h", "help"):
        print(usage())
        return DONE
    if args[0] in ("--version", "-V"):
        print(f"dytrun {__version__}")
        return DONE
    if args[0].startswith("bench="):
        args = ["bench", *args]
    verb, *rest = args
    if verb not in COMMANDS:
        _refuse_word(verb, list(COMMANDS), [*COMMANDS, *(f"data {word}" for word in DATA)])
    if verb == "data" and rest[:1] not in ([], ["--help"], ["-h"]):
        word, *rest = rest
        if word not in DATA:
            _refuse_word(word, list(DATA), list(DATA))
        verb = f"data {word}"
    if verb == "data" and not rest:
        raise UserError(f"dytrun data: do what? say {' or '.join(f'dytrun data {word}' for word in DATA)}")
    if "--help" in rest or "-h" in rest:
        print(command_help(verb, config_dir_of(rest)))
        return DONE
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        if verb == "train":
            raise UserError(f"'{rest[0]}' is no key=value; see dytrun train --help")
        key = "source" if verb == "data pack" else "dir"
        rest[0] = f"bench={rest[0]}" if verb == "bench" else f"{key}={compose.quoted(rest[0])}"
    extra = [arg for before, arg in itertools.pairwise(rest)
             if arg in compose.MULTIRUN or (is_bare(arg) and before not in _VALUED)]  # fmt: skip
    if verb != "train" and extra:
        what = "benchmark" if verb == "bench" else "directory"
        raise UserError(f"{extra[0]}: dytrun {verb} takes one {what} and key=value, and does not sweep")
    if any(flag_name(arg) in _SHOW for arg in rest):
        return _show(verb, [arg for arg in rest if arg not in compose.MULTIRUN])
    return {
        "train": _train, "eval": _eval, "replay": _replay, "bench": _bench, "probe": _probe, "report": _report,
        "data pack": _pack, "data verify": _verify,
    }[verb](rest)  # fmt: skip


def _refuse_word(word: str, known: list[str], meant: list[str]) -> NoReturn:
    from dytrun.validation import near

    raise UserError(f"'{word}' is no command{near(word, meant) or ';'} the commands are {', '.join(known)}")


def _train(args: list[str]) -> int:
    found = compose.expand(args)
    names = list(dict.fromkeys(config.run_name for config in found.configs))  # a missing init_from stops all of them
    first, is_several = found.configs[0], found.is_open or len(found.configs) > 1
    if is_several and "RANK" in os.environ:
        raise UserError("-m: several runs under one torchrun cannot be told apart; leave torchrun out, dytrun starts "
                        "its own ranks, or start one torchrun a run")  # fmt: skip
    is_here = _runs_here(found)
    if not is_several and not first.dry_run and os.environ.get("RANK", "0") == "0":
        from dytrun import owner

        if said := owner.relatives(first):
            print(f"{first.run_name}: {said}")
    with _folder(None if is_here or first.dry_run else Path(first.runs_dir)) as folder:
        task = Task(str(folder), config_dir_of(args), in_turn=is_here)
        try:
            _hydra("train", [f"hydra.sweep.dir={compose.quoted(folder)}", *map(compose.addable, args)], task)
        except Exception as error:
            # A sweeper that searches may give up over a run without a value; what the runs came to is said below.
            if isinstance(error, UserError) or not outcomes(folder):
                raise
            print(f"dytrun: the sweep ended early ({type(error).__name__}: {first_line(error)})", file=sys.stderr)
        ended = outcomes(folder)
    missing = [] if found.is_open else [name for name in names if name not in ended]
    code = exit_code(
        [*ended.values(), *(Outcome(name, "failed") for name in missing if "job" not in ended)], is_several
    )
    _say_what_failed(list(ended.values()), missing, is_several)
    if is_several and code != stop.STOPPED and not first.dry_run:
        from dytrun import commands

        config = compose.expand([f"dir={compose.quoted(first.runs_dir)}"], "report").configs[0]
        commands.close_sweep(config, len(ended) + len(missing))
    return code


def _runs_here(found: compose.Expanded) -> bool:
    """Check what a sweep is launched with, and make our own launchers known to Hydra.

    Returns:
        Whether the jobs run in this process, one after the other.

    Raises:
        UserError: a setting is wrong, or does not fit this machine; or there is no sweep to launch.
    """
    from hydra.core.plugins import Plugins

    target = str(found.launcher["_target_"])
    if target.endswith(".BasicLauncher"):
        return True
    if not found.is_sweep:
        raise UserError("hydra/launcher: it starts the jobs of a sweep, and this is one run; add -m")
    settings = {key: value for key, value in found.launcher.items() if key != "_target_"}
    known = Plugins.instance().class_name_to_class
    if target.endswith(".dytrun.LocalPool"):
        from dytrun import pool

        pool.check(settings)
        known[target] = pool.LocalPool
    elif target.endswith(".dytrun.Slurm") or "submitit" in target:
        try:
            from dytrun import slurm
        except ImportError:
            raise UserError("hydra/launcher: the package for SLURM is not here; pip install 'dytrun[slurm]'") from None
        slurm.check(target, settings)
        known["hydra_plugins.dytrun.Slurm"] = slurm.Slurm
    return False


@contextmanager
def _folder(runs_dir: Path | None) -> Iterator[Path]:
    """Give the jobs of a command line a folder; beside the runs, where other machines must see it too.

    It is removed if nothing went wrong: a run's identity is its science, so nobody needs what Hydra writes down.
    """
    if runs_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    is_ours = not runs_dir.exists()
    try:
        (runs_dir / ".sweeps").mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=runs_dir / ".sweeps")).resolve()
    except OSError as error:
        raise UserError(f"runs_dir: {runs_dir} cannot be written ({error.strerror}); choose another") from None
    is_kept = True
    try:
        yield folder
        is_kept = any(one.ending not in ("finished", "diverged") for one in outcomes(folder).values())
    except UserError:
        is_kept = False
        raise
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # another sweep has something there
                folder.parent.rmdir()
                if is_ours:
                    runs_dir.rmdir()


def _say_what_failed(ended: Sequence[Outcome], missing: Sequence[str], is_sweep: bool) -> None:
    """Print on stderr what went wrong: in a sweep with the run's name; a bug with its traceback."""
    bad = [one for one in ended if one.ending in ("failed", "refused", "stopped")]
    for one in bad:
        if one.trace:
            print(guard.struck(one.trace), file=sys.stderr)
        for line in one.problems:
            print(f"dytrun: {f'{one.run}: ' if is_sweep else ''}{guard.printable(line)}", file=sys.stderr)
    if any(one.ending == "stopped" for one in bad):
        print("dytrun: type the command again to go on from the last checkpoint", file=sys.stderr)
        return
    for name in missing:
        print(f"dytrun: {name}: ended without a word", file=sys.stderr)
    if is_sweep and bad:
        print(f"dytrun: {len(bad) + len(missing)} of {len(ended) + len(missing)} runs failed", file=sys.stderr)


def _eval(args: list[str]) -> int:
    from dytrun import commands

    commands.evaluate(compose.expand(args, "eval").configs[0])
    return DONE


def _replay(args: list[str]) -> int:
    from dytrun import commands

    return DONE if commands.replay(compose.expand(args, "replay").configs[0]) else FAILED


def _bench(args: list[str]) -> int:
    from dytrun import commands

    commands.bench(compose.expand(args, "bench").configs[0])
    return DONE


def _probe(args: list[str]) -> int:
    from dytrun import commands

    commands.probe(compose.expand(args, "probe").configs[0])
    return DONE


def _pack(args: list[str]) -> int:
    from dytrun import commands

    try:
        commands.pack(compose.expand(args, "data pack").configs[0])
    except KeyboardInterrupt:
        print("dytrun: stopped; type the command again, and it goes on after the files that are whole", file=sys.stderr)
        return stop.STOPPED
    except RunError as error:
        print(f"dytrun: {guard.struck(str(error))}", file=sys.stderr)
        return FAILED
    return DONE


def _verify(args: list[str]) -> int:
    from dytrun import commands

    commands.verify(compose.expand(args, "data verify").configs[0])
    return DONE


def _report(args: list[str]) -> int:
    from dytrun import commands

    commands.show_report(compose.expand(args, "report").configs[0])
    return DONE


def _show(verb: str, args: list[str]) -> int:
    def no_task(cfg: Any) -> None:
        """Stand in for a command while Hydra only shows something."""

    if not any(flag_name(arg) in _COMPLETE for arg in args):
        compose.check_shown(args, verb)
    _hydra(verb, [compose.addable(arg) for arg in args], no_task)
    return DONE


def _hydra(verb: str, args: list[str], task: Callable[[Any], Any]) -> None:
    """Give the rest to Hydra."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    overrides = compose.overrides_of(args)  # Hydra's parser wants them in one piece
    sys.argv = ["dytrun", *overrides, *(arg for arg in args if arg not in overrides)]
    try:
        with compose.raw_errors():
            hydra.main(config_path=str(CONF), config_name=config_name(verb), **compose.version_base())(task)()
    except Exception as error:
        compose.raise_composition(error)


def _complete(args: list[str]) -> int:
    """Complete a shell's line: the command first, then what Hydra knows of that command."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(COMMANDS))
        return DONE
    verb = words[1]
    if verb == "data":
        if len(words) < 3 or (len(words) == 3 and not line.endswith(" ")):
            print(" ".join(DATA))
            return DONE
        verb = f"data {words[2]}"
    if verb in COMMANDS or verb in {f"data {word}" for word in DATA}:
        # Without the command, and without the directory behind it, which Hydra would take for a wrong override.
        line = re.sub(rf"^(\S+)\s+{verb.replace(' ', chr(92) + 's+')}(\s+[^\s=-][^\s=]*(?=\s))?", r"\1", line)
        os.environ["COMP_LINE"], os.environ["COMP_POINT"] = line, str(len(line))
        return _show(verb, args)
    return DONE
