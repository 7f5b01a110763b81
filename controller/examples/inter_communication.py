"""A service, somebody who watches it, and attackers: `inter_communication.rs` runs them in streams.

Parameters: for all but the service `service` (a host), for attackers `connections`.
"""

import socket
import threading
import time

import millstream


def ask(host, port, question):
    """Sends one line and gives the answer."""
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(question.encode() + b"\n")
        return connection.makefile().readline().strip()


class Service:
    """Answers lines, each in a thread, until it is told to stop.

    :millstream: hidden
    """

    def setUp(self):
        self.answered, self.lock = 0, threading.Lock()
        self.listener = socket.socket()
        self.listener.bind(("", 0))
        self.listener.listen(256)
        threading.Thread(target=self.accept, daemon=True).start()
        millstream.publish("service", self.listener.getsockname()[1])

    def accept(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection, connection.makefile() as lines:
            connection.sendall(lines.readline().upper().encode())
        with self.lock:
            self.answered += 1

    def test(self):
        # The watcher ends last, and says so.
        millstream.wait("watched", 1, timeout=300)
        self.whiteboard = "{} questions answered".format(self.answered)

    def tearDown(self):
        self.listener.close()


class Watcher:
    """Asks again and again while the attackers are at work, and tells the slowest answer.

    :millstream: hidden
    """

    def setUp(self):
        self.port = int(millstream.wait("service")[0])
        if ask(self.params.get("service"), self.port, "hello") != "HELLO":
            raise AssertionError("the service does not answer as it should")
        millstream.publish("watching", 1)

    def test(self):
        slowest, questions = 0.0, 0
        attackers = self.params.get("attackers")
        while questions == 0 or len(millstream.get("attacked")) < attackers:
            begin = time.monotonic()
            ask(self.params.get("service"), self.port, "still there?")
            slowest, questions = max(slowest, time.monotonic() - begin), questions + 1
        self.whiteboard = "{} questions under attack, slowest answer {:.0f} ms".format(questions, slowest * 1000)

    def tearDown(self):
        millstream.publish("watched", 1)


class Attacker:
    """Opens many connections at once."""

    def test(self):
        port = int(millstream.wait("service")[0])
        answers = []

        def attack(number):
            answers.append(ask(self.params.get("service"), port, "attack {}".format(number)))

        threads = [threading.Thread(target=attack, args=(n,)) for n in range(self.params.get("connections"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.whiteboard = "{} of {} answered".format(len(answers), len(threads))
        if len(answers) < len(threads):
            raise AssertionError("the service was brought down")

    def tearDown(self):
        millstream.publish("attacked", 1)
