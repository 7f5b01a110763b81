import socket

import millstream
import wording


class Echo:
    """Answers one line.

    :millstream: hidden
    """

    def setUp(self):
        self.listener = socket.socket()
        self.listener.bind(("", 0))
        self.listener.listen(1)
        millstream.publish("port", self.listener.getsockname()[1])

    def test(self):
        connection, _ = self.listener.accept()
        with connection, connection.makefile() as lines:
            connection.sendall(wording.answer_to(lines.readline()).encode())
        self.whiteboard = "answered"

    def tearDown(self):
        self.listener.close()


class Numbers:
    def test_sum(self):
        assert sum(self.params.get("numbers", default=[])) == 6

    def test_order(self):
        numbers = self.params.get("numbers", default=[])
        assert numbers == sorted(numbers)
