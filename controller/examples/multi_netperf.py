"""Both ends of a throughput measurement, as classes: `multi_netperf.rs` runs them in streams.

Parameters: `parties` (the server and every client), for clients also `server` (a host) and `seconds`.
"""

import socket
import threading
import time

import millstream

CHUNK = 128 * 1024


class NetServer:
    """Takes in whatever clients send, until all of them are done.

    Of no use alone, so it is found only by its name.

    :millstream: hidden
    """

    def setUp(self):
        self.received = {}
        self.listener = socket.socket()
        self.listener.bind(("", 0))
        self.listener.listen(16)
        millstream.publish("port", self.listener.getsockname()[1])
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            connection, peer = self.listener.accept()
            threading.Thread(target=self.receive, args=(connection, peer), daemon=True).start()

    def receive(self, connection, peer):
        self.received[peer] = 0
        with connection:
            while True:
                data = connection.recv(CHUNK)
                if not data:
                    return
                self.received[peer] += len(data)

    def test(self):
        parties = self.params.get("parties")
        millstream.barrier("setup", parties)
        millstream.barrier("finished", parties)
        print("{} connections, {} bytes".format(len(self.received), sum(self.received.values())))
        if not self.received:
            raise AssertionError("nobody has connected")

    def tearDown(self):
        self.listener.close()


class NetPerf:
    """Sends as fast as it can for some seconds."""

    def setUp(self):
        port = int(millstream.wait("port")[0])
        millstream.barrier("setup", self.params.get("parties"))
        self.connection = socket.create_connection((self.params.get("server"), port), timeout=30)

    def test(self):
        data, sent = bytes(CHUNK), 0
        begin = time.monotonic()
        while time.monotonic() - begin < self.params.get("seconds", default=1):
            self.connection.sendall(data)
            sent += len(data)
        self.whiteboard = "{:.2f} Gbit/s".format(sent * 8 / 1e9 / (time.monotonic() - begin))

    def tearDown(self):
        if hasattr(self, "connection"):
            self.connection.close()
        # Entered also after a failure, so that the server does not wait for somebody who has given up.
        millstream.barrier("finished", self.params.get("parties"))
