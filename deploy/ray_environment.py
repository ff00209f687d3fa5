"""Environment variables that Ray reads when it is imported, so they are set before."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from common.errors import UserError


def prepare() -> None:
    """For a Ray of this process's own: asks for sockets on loopback only, token authentication with a token that is written nowhere, no
    usage statistics, and this checkout's modules.

    What the user has set stays as it is. Workers inherit all of it from Ray's processes, which inherit it from this one.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # With it Ray takes 127.0.0.1 for this machine's address, and then listens on no other. It turns an address of loopback that
    # `ray.init` is given into another one, and listens on all.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    _prepare_modules()


def prepare_to_attach(address: str) -> None:
    """For a cluster that is there: the same, with the cluster's token, as Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
      UserError: where there is no token, and nobody said that the cluster has none.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        try:
            token = path.read_text().strip()
        except OSError as error:
            token = ""
            why = error.strerror
        else:
            why = "it is empty"
        if not token:
            raise UserError(
                f"--address {address}: {path} has no token ({why}): copy the head's there, with mode 600 (`ray get-auth-token` prints it there), or "
                f"name its file in RAY_AUTH_TOKEN_PATH; RAY_AUTH_MODE=disabled is for a cluster that has none, which whoever reaches it commands"
            )
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # Seconds until a wrong token is told, not 20.
    _prepare_modules()


def _prepare_modules() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
