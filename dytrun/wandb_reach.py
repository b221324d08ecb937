"""W&B's library, its service process and its server: whether there is a key, and whether anybody answers."""

import contextlib
import http.client
import netrc
import os
import signal
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from dytrun.config import TrackingConfig
from dytrun.errors import first_line

_PROBE_TIMEOUT_S = 2.0
_INIT_TIMEOUT_S = 10.0
_FINISH_TIMEOUT_S = 60.0


def choose_mode(tracking: TrackingConfig) -> tuple[str, str]:
    """Return (online, offline or off; why): online needs a key and a server that answers within two seconds.

    The environment's WANDB_MODE decides where `tracking.mode=auto`.
    """
    if tracking.mode != "auto":
        return tracking.mode, f"tracking.mode={tracking.mode}"
    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("online", "offline", "disabled"):
        return ("off" if wanted == "disabled" else wanted), f"WANDB_MODE={wanted}"
    problem = why_not()
    return ("offline", problem) if problem else ("online", "")


def why_not() -> str:
    """Return why W&B's server cannot be asked anything, no key or no answer; an empty text if it can."""
    settings = library().setup().settings
    host = urlsplit(settings.base_url).hostname or ""
    if not _has_key(host, settings.api_key):
        return "no API key (wandb login)"
    silence = _silence(settings.base_url)
    return f"{host} is out of reach ({silence})" if silence else ""


def default_entity() -> str:
    """Ask the server for the entity that runs go to where none is named."""
    return library().Api().default_entity


def abandon(at_once: bool) -> None:
    """Give up W&B's service process and everything that it still has to do; `at_once` without asking it."""
    if at_once:
        for pid in _service_processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    import wandb

    # Else wandb's own exit hook waits for a process that may never be done. It exits with the service's code.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def library() -> Any:
    """Import wandb: a second that a run without W&B need not pay."""
    # Its reports of itself go to the same server, and hold up the end of the process if that is dead.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # or it tells standard error where it has found a key
    return wandb


def settings(wandb: Any) -> Any:
    """Nothing of the command line, the environment or the code goes to a server unasked: a key may be in it."""
    return wandb.Settings(
        init_timeout=_INIT_TIMEOUT_S,
        finish_timeout=_FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_disable_meta=True,
        disable_git=True,
        save_code=False,
        console="off",
        silent=True,
    )


def _has_key(host: str, key: str | None) -> bool:
    if key or os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _silence(url: str) -> str:
    """Return why a server does not count as alive, or an empty text; asked by way of the user's proxy, if any.

    A thread asks, because a time-out of urllib is one of each read: a server could send a byte a second.
    """
    found: list[str] = []

    def ask() -> None:
        try:
            urlopen(url, timeout=_PROBE_TIMEOUT_S).close()
            found.append("")
        except HTTPError as error:
            found.append(f"it answers {error.code}" if error.code >= 500 else "")
        except (OSError, ValueError, http.client.HTTPException) as error:
            # Which certificates are good is W&B's business, and it may have been told of others.
            is_tls = isinstance(error, URLError) and isinstance(error.reason, ssl.SSLError)
            found.append("" if is_tls else first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_TIMEOUT_S)
    return found[0] if found else f"no answer within {_PROBE_TIMEOUT_S:g} s"


def _service_processes() -> Iterator[int]:
    """Return W&B's service among the children of this process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = path.read_text().rpartition(")")
            if "(wandb-core" in head and int(tail.split()[1]) == os.getpid():
                yield int(path.parent.name)
