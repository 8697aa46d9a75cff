"""Cuts a Python process off from the network: put this folder on PYTHONPATH.

Python imports `sitecustomize` at start-up, so notebooks' kernels and every process they start are covered.
An audit hook sees each connection and each name look-up before the operating system does, and cannot be
taken off again. Loopback stays open, because Jupyter's kernels and local workers talk over it.
"""
import errno
import ipaddress
import socket
import sys

LOCAL_NAMES = {"", "localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"}
WATCHED = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1,  # position of the address in the event
           "socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}


def is_local(host):
    """Whether `host` names this machine: loopback, unspecified, or its own host name."""
    if host is None:
        return True
    if isinstance(host, (bytes, bytearray)):
        host = bytes(host).decode("ascii", "replace")
    if host.lower() in LOCAL_NAMES or host == socket.gethostname():
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def guard(event, args):
    """Audit hook: an attempt to leave this machine fails as it does where no network exists."""
    place = WATCHED.get(event)
    if place is None or len(args) <= place:
        return
    target = args[place]
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(target, tuple) or not target:
            return  # a Unix socket's path, or no address at all
        target = target[0]
    if not is_local(target):
        raise OSError(errno.ENETUNREACH, f"the network is blocked in this test run (wanted {target!r})")


sys.addaudithook(guard)
