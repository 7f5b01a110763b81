"""Barriers, topics, parameters and results for a block in Python.

    import millstream

    port = millstream.wait("port")[0]          # the first value of a topic, as text
    millstream.barrier("setup", 2)             # all parties, or an exception that says who broke it and why
    millstream.whiteboard("9.4 Gbit/s")

Works inside a block only, with Python 3.6 or newer and its standard library. Barriers and topics go through the
`millstream-sync` command that the agent puts on the block's PATH.
"""

import fnmatch
import json
import os
import subprocess
import threading

__all__ = [
    "BarrierBroken", "Error", "Params", "TimedOut", "abort", "barrier", "get", "output_dir", "param", "params", "publish",
    "subscribe", "topology", "wait", "whiteboard",
]


class Error(Exception):
    """A call did not do what it was made for; the text says why."""


class BarrierBroken(Error):
    """The barrier broke, or nobody is left who could publish: the text says by whom, where and why."""


class TimedOut(Error):
    """Patience ended before enough values were there."""


class Params:
    """Parameters by name, as `self.params` of a class has them; an object among them is a node of its own."""

    def get(self, name, path=None, default=None):
        """The parameter of the first node that has it; `path`, such as `/boot` or `*/boot/*`, says which nodes count."""
        for node, values in _nodes("/", params()):
            matches = path is None or any(fnmatch.fnmatchcase(node + end, path) for end in ("", "/", "/*"))
            if matches and name in values:
                return values[name]
        return default


def _nodes(path, values):
    """A tree as its nodes, those above first."""
    yield path, {name: value for name, value in values.items() if not isinstance(value, dict)}
    for name, value in values.items():
        if isinstance(value, dict):
            for node in _nodes(path.rstrip("/") + "/" + name, value):
                yield node


def barrier(name, parties=None, timeout=60, payload=None):
    """Waits until `parties` have entered the barrier: a number, "all" streams, or None for the size of the group that the
    block was run on; "all+1" and "group+1" are one more, such as main.

    Gives a dictionary: `generation` from 1, `arrival` from 0, `waited_seconds`, and `parties`, a list of dictionaries
    with `name`, `arrival` and `payload`. A large meeting lists only the parties that brought a payload.
    """
    arguments = ["barrier", "--timeout", _seconds(timeout)]
    content = None
    if payload is not None:
        arguments += ["--payload", "-"]
        content = _content(payload)
    arguments += ["--", name] + ([] if parties is None else [str(parties)])
    released = _call(arguments, content)
    for party in released["parties"]:
        party["payload"] = _value(party, "payload")
        party.pop("payload_hex", None)
    return released


def abort(name, reason):
    """Breaks a barrier with a reason, for everybody."""
    _call(["abort", "--", name, str(reason)])


def publish(topic, value):
    """Appends a value to a topic and gives its index, from 0: a rank that nobody else gets.

    Text and bytes are published as they are, everything else as JSON.
    """
    return _call(["publish", "--", topic, "-"], _content(value))["index"]


def wait(topic, count=1, timeout=60):
    """Waits until the topic has `count` values and gives the first `count` as a list of texts (or bytes)."""
    answer = _call(["wait", "--timeout", _seconds(timeout), "--", topic, str(int(count))])
    return [_value(value, "value") for value in answer["values"]]


def get(topic):
    """The values of a topic as they are, without waiting."""
    return [_value(value, "value") for value in _call(["get", "--", topic])["values"]]


def subscribe(topic, start=0):
    """The values of a topic from index `start` on, one after the other, those that come later included.

    On the main thread the block waits for each value, as by `wait`: blocks that wait for each other's values are told at
    once. On another thread it listens, and may do something else meanwhile.

    Raises BarrierBroken when no other task is left that could publish more.
    """
    start = int(start)
    if threading.current_thread() is not threading.main_thread():
        for value in _listen(topic, start):
            yield value
        return
    while True:
        values = _call(["subscribe", "--once", "--from", str(start), "--", topic])["values"]
        if not values:
            return
        start += len(values)
        for value in values:
            yield _value(value, "value")


def _listen(topic, start):
    process = _start(["subscribe", "--from", str(start), "--", topic], stdin=subprocess.DEVNULL)
    try:
        for line in process.stdout:
            answer = json.loads(line.decode("utf-8"))
            if "error" in answer:
                raise _error(answer["error"])
            yield _value(answer, "value")
    finally:
        process.stdout.close()
        process.terminate()
        process.wait()


def params():
    """Every parameter of the block, as a dictionary."""
    return _json_file("MILLSTREAM_PARAMS")


def param(name, default=None):
    """One parameter; `default` when the block was not given it."""
    return params().get(name, default)


def topology():
    """Every defined stream, with its host and addresses."""
    return _json_file("MILLSTREAM_TOPOLOGY")


def whiteboard(text):
    """Adds a line to the whiteboard, which is shown with the outcome; at most 1 MiB together."""
    with open(_variable("MILLSTREAM_WHITEBOARD"), "ab") as board:
        board.write(str(text).encode("utf-8") + b"\n")


def output_dir():
    """A directory; everything in it comes home as `data/`."""
    return _variable("MILLSTREAM_OUTPUT")


def _variable(name):
    value = os.environ.get(name)
    if not value:
        raise Error("{} is not set: `import millstream` works inside a block only".format(name))
    return value


def _json_file(variable):
    with open(_variable(variable), "rb") as file:
        return json.loads(file.read().decode("utf-8"))


def _seconds(timeout):
    return repr(float(timeout))


def _content(value):
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode("utf-8")
    return json.dumps(value, separators=(",", ":")).encode("utf-8")


def _value(answer, name):
    if name + "_hex" in answer:
        return bytes.fromhex(answer[name + "_hex"])
    return answer[name]


def _start(arguments, stdin):
    _variable("MILLSTREAM_SYNC")
    try:
        return subprocess.Popen(
            ["millstream-sync", "--json"] + arguments,
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise Error("failed to start `millstream-sync`: {}".format(error))


def _call(arguments, content=None):
    process = _start(arguments, subprocess.DEVNULL if content is None else subprocess.PIPE)
    try:
        printed, _ = process.communicate(content)
    except BaseException:
        # Interrupted while waiting: the party must not stay behind.
        process.kill()
        process.wait()
        raise
    text = printed.decode("utf-8").strip()
    if not text:
        raise Error("`millstream-sync {}` ended with exit code {} and said nothing".format(
            arguments[0], process.returncode))
    answer = json.loads(text)
    if "error" in answer:
        raise _error(answer["error"])
    return answer


def _error(error):
    kinds = {"broken": BarrierBroken, "timed_out": TimedOut}
    return kinds.get(error["kind"], Error)(error["message"])
