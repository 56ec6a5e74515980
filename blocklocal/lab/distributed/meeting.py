"""Where the launchers of several machines meet: at an endpoint that one of them hosts."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

from blocklocal.lab.distributed.rendezvous import Alone, Endpoint, Rendezvous
from blocklocal.lab.errors import UserError


def meet(endpoint: str, *, machines: tuple[int, int], processes: int, folder: Path) -> Rendezvous:
    """Where the processes of the least to the most machines meet; those of one machine alone, in a folder.

    UserError: nobody answers at the endpoint.
    """
    if machines == (1, 1):
        return Alone(processes=processes, folder=folder)
    address, hosts = _address(endpoint)
    least, most = machines
    count = str(most) if least == most else f"{least}:{most}"
    print(f"bll: meeting at {endpoint}, {count} machines", file=sys.stderr)
    try:
        return Endpoint(endpoint, processes=processes, machines=machines, address=address, hosts=hosts)
    except OSError as error:
        raise UserError(f"--rdzv-endpoint {endpoint}: {error}") from error


def _address(endpoint: str) -> tuple[str, bool]:
    """The address at which the endpoint reaches this machine, and whether the endpoint is on this machine.

    UserError: not HOST:PORT, or an unknown host.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 1 <= int(port) <= 65535:
        raise UserError(f"--rdzv-endpoint {endpoint}: write HOST:PORT, with a port from 1 to 65535")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((host, int(port)))
            address = way.getsockname()[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--rdzv-endpoint {endpoint}: the host cannot be reached ({error})") from error
    with socket.socket() as place:
        try:
            place.bind((host, int(port)))
        except OSError:  # the address of another machine, or in use by another launcher on this one
            return address, False
    return address, True
