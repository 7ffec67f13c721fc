"""A server in a thread of the test process, and a client of bare sockets."""

import socket
import threading
from contextlib import contextmanager

from unime_st.serve import Limits
from unime_st.serve.server import address_of, listen, serve


@contextmanager
def running(app, limits=None):
    """Yield the address of an application that is served on loopback."""
    servers = []
    with listen("127.0.0.1", 0) as listening:
        address = address_of(listening)
        thread = threading.Thread(
            target=serve, args=(app, listening, limits or Limits()), kwargs={"ready": servers.append}
        )
        thread.start()
        try:
            yield address
        finally:
            while not servers:
                thread.join(0.05)
            servers[0].should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def port_of(address):
    """The port of an address."""
    return int(address.rpartition(":")[2])


def send(address, *pieces, timeout=20):
    """Send pieces of bytes to a server, and read its answer to the end."""
    with socket.create_connection(("127.0.0.1", port_of(address)), timeout=timeout) as one:
        for piece in pieces:
            one.sendall(piece)
        answer = b""
        while piece := one.recv(65536):
            answer += piece
        return answer
