"""Both ends of a small throughput measurement as tests of Avocado, and what else such tests do."""

import socket
import time

import avocado
import millstream

CHUNK = 64 * 1024


class NetServer(avocado.Test):
    """Takes in whatever its clients send.

    :avocado: disable
    """

    def setUp(self):
        self.parties = self.params.get("parties")
        self.listener = socket.socket()
        self.listener.bind(("", 0))
        self.listener.listen(4)
        millstream.publish("port", self.listener.getsockname()[1])

    def test(self):
        millstream.barrier("setup", self.parties)
        received = 0
        for _ in range(self.parties - 1):
            connection, _ = self.listener.accept()
            with connection:
                data = connection.recv(CHUNK)
                while data:
                    received += len(data)
                    data = connection.recv(CHUNK)
        self.whiteboard = "{} bytes".format(received)
        millstream.barrier("finished", self.parties)

    def tearDown(self):
        self.listener.close()
        print("listener closed")


class NetPerf(avocado.Test):
    def setUp(self):
        port = int(millstream.wait("port")[0])
        millstream.barrier("setup", self.params.get("parties"))
        self.connection = socket.create_connection((self.params.get("server", path="/run/*"), port), timeout=30)

    def test(self):
        with self.connection:
            self.connection.sendall(bytes(self.params.get("bytes", default=CHUNK)))

    def tearDown(self):
        millstream.barrier("finished", self.params.get("parties"))


class Other(avocado.Test):
    """:avocado: disable"""

    def test_fails(self):
        self.log.info("a word to the log")
        self.fail("no such route")

    def test_cancels(self):
        self.cancel("no such card")

    def test_sleeps(self):
        time.sleep(1000)

    def test_waits(self):
        millstream.barrier("nobody else comes", 2, timeout=600)

    def tearDown(self):
        print("torn down in " + self.workdir)
