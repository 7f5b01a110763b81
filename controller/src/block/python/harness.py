"""Runs one method of one class as a block: set-up, the method, tear-down.

Started by the agent as `harness.py FILE CLASS METHOD`; not for users. Plain classes, `unittest.TestCase` and, where it is
installed, `avocado.Test` are run alike: `tearDown` always runs once `setUp` has begun, a request to terminate is raised
where the code is, and the phase that failed is told with its cause. Python 3.6 or newer and its standard library.

Which phase runs is told in lines on the descriptor that MILLSTREAM_PHASES names: `begin setup`, `failed why`, `end`.
"""

import asyncio
import functools
import importlib.util
import inspect
import os
import signal
import sys
import threading
import traceback
import unittest

import millstream

# One line of the descriptor is written at once or not at all.
LINE_BYTES_MAX = 1024
SKIPS = ("SkipTest", "TestSkipError", "TestCancel")
EXIT_FAILED = 1


class Terminated(BaseException):
    """The block is to end: its time is over, or it was stopped. No `except Exception` takes it for its own."""


class Phases:
    """What is going on, and how it went. The first failure is the one that counts."""

    def __init__(self):
        number = os.environ.pop("MILLSTREAM_PHASES", "")
        self.descriptor = int(number) if number.isdigit() else None
        if self.descriptor is not None:
            os.set_inheritable(self.descriptor, False)
        self.current = None
        self.noted = []
        self.failed = False
        self.skipped = None
        self.interrupted_in = set()
        self.raised = []

    def begin(self, phase):
        if self.current == phase:
            return
        self.tell("begin " + phase)
        self.current = phase

    def note(self, error, where):
        """Takes in what a phase raised; the same error only once."""
        if any(error is other for other in self.noted):
            return
        self.noted.append(error)
        if self.current != "teardown" and any(kind.__name__ in SKIPS for kind in type(error).__mro__):
            self.skipped = str(error) or "without a reason"
            return
        traceback.print_exception(type(error), error, trimmed(error.__traceback__))
        self.fail("{} raised {}{}".format(where, described(error), place_of(error)))

    def fail(self, why):
        self.failed = True
        self.tell("failed " + why)

    def finish(self):
        for error in self.raised:
            # One that came between two steps of this file was met by nobody.
            self.note(error, "the block")
        if not self.failed and self.skipped is not None:
            print("skipped: " + self.skipped, file=sys.stderr)
            self.tell("end skipped: " + self.skipped)
        else:
            self.tell("end")
        self.current = None

    def tell(self, line):
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        if self.descriptor is None:
            return
        line = " ".join(line.split()).encode("utf-8", "replace")[:LINE_BYTES_MAX - 1] + b"\n"
        try:
            os.write(self.descriptor, line)
        except OSError:
            # Nobody listens any more: the block goes on to its end.
            self.descriptor = None

    def interrupt(self, number, frame):
        """Raised once for each phase, so that a tear-down that follows is not cut short by the same request."""
        if self.current is None or self.current in self.interrupted_in:
            return
        self.interrupted_in.add(self.current)
        error = Terminated("the block was asked to end (signal {})".format(number))
        self.raised.append(error)
        raise error


def described(error):
    text = str(error)
    name = type(error).__name__
    return "{}: {}".format(name, text) if text else name


def trimmed(trace):
    """Without the frames of this file, which tell nothing about the block."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__ and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def place_of(error):
    """Where in the block's own files it was raised: the innermost frame that is in its directory."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(DIRECTORY + os.sep) and frame.filename != __file__:
            place = " ({}:{})".format(os.path.basename(frame.filename), frame.lineno)
    return place


class Result(unittest.TestResult):
    """Hands what unittest finds on to the phases."""

    def __init__(self, phases, where):
        super().__init__()
        self.phases, self.where = phases, where

    def addError(self, test, err):
        self.phases.note(err[1], self.where)

    addFailure = addError

    def addSkip(self, test, reason):
        self.phases.skipped = reason

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.phases.note(err[1], str(subtest))


def watched(phases, phase, function, where, should_fail=False):
    """The function, with its phase and what it raises told."""
    def passed(result):
        if should_fail:
            phases.fail(where + " was expected to fail and passed")
        return result

    if inspect.iscoroutinefunction(function):
        @functools.wraps(function)
        async def wrapper(*arguments, **named):
            try:
                phases.begin(phase)
                return passed(await function(*arguments, **named))
            except BaseException as error:
                if not should_fail or isinstance(error, Terminated):
                    phases.note(error, where)
                raise
    else:
        @functools.wraps(function)
        def wrapper(*arguments, **named):
            try:
                phases.begin(phase)
                return passed(function(*arguments, **named))
            except BaseException as error:
                if not should_fail or isinstance(error, Terminated):
                    phases.note(error, where)
                raise
    return wrapper


def quietly(function, *arguments):
    """What it raises was noted already."""
    try:
        result = function(*arguments)
        if inspect.iscoroutine(result):
            asyncio.new_event_loop().run_until_complete(result)
        return True
    except BaseException:
        return False


def run_by_hand(phases, case, class_name, method):
    """Plain classes, and those of Avocado, whose own runner does much more than this."""
    def step(phase, name):
        return quietly(watched(phases, phase, getattr(case, name, lambda: None), class_name + "." + name))

    try:
        if step("setup", "setUp"):
            step("run", method)
    finally:
        step("teardown", "tearDown")


def run_unittest(phases, case, class_name, method):
    """Runs as unittest does, but that `tearDown` is called after a `setUp` that failed, too."""
    kind, began = type(case), []
    test = getattr(case, method)
    expecting = any(getattr(place, "__unittest_expecting_failure__", False) for place in (test, kind))
    where = class_name + "." + method
    steps = (
        ("setup", "setUp", lambda function: began.append(True)),
        ("run", method, None),
        ("teardown", "tearDown", lambda function: began.clear()),
    )
    for phase, name, first in steps:
        function = watched(phases, phase, getattr(case, name), class_name + "." + name, expecting and name == method)
        setattr(case, name, function if first is None else after(first, function))
    try:
        if quietly(watched(phases, "setup", kind.setUpClass, class_name + ".setUpClass")):
            case.run(Result(phases, where))
    except BaseException as error:
        phases.note(error, where)
    finally:
        if began:
            quietly(case.tearDown)
        quietly(watched(phases, "teardown", kind.tearDownClass, class_name + ".tearDownClass"))
        quietly(getattr(kind, "doClassCleanups", lambda: None))


def after(first, function):
    """Both, one after the other."""
    @functools.wraps(function)
    def both(*arguments, **named):
        first(function)
        return function(*arguments, **named)
    return both


def load(path):
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def avocado_test():
    """The class that tests of Avocado inherit from, where that is installed and was imported."""
    module = sys.modules.get("avocado")
    return getattr(module, "Test", None)


def make_case(module, class_name, method):
    kind = getattr(module, class_name, None)
    if not inspect.isclass(kind):
        raise AttributeError("{} has no class {}".format(os.path.basename(module.__file__), class_name))
    if not callable(getattr(kind, method, None)):
        raise AttributeError("class {} has no method {}".format(class_name, method))
    avocado = avocado_test()
    if avocado is not None and issubclass(kind, avocado):
        directory = os.path.join(os.environ["MILLSTREAM_PRIVATE"], "avocado")
        os.makedirs(directory, exist_ok=True)
        case = kind(methodName=method, params=avocado_params(), base_logdir=directory)
        return case, run_by_hand
    if issubclass(kind, unittest.TestCase):
        case, runner = kind(method), run_unittest
    else:
        case, runner = kind(), run_by_hand
    for name, value in (("params", millstream.Params()), ("outputdir", millstream.output_dir())):
        if not hasattr(case, name):
            setattr(case, name, value)
    return case, runner


def avocado_params():
    from avocado.core.tree import TreeNode
    return [TreeNode("run", value=dict(millstream.params()))], ["/", "/run/*"]


def write_whiteboard(case):
    text = getattr(case, "whiteboard", None)
    if text and not callable(text):
        millstream.whiteboard(text)


def main(path, class_name, method):
    phases = Phases()
    phases.begin("setup")
    signal.signal(signal.SIGTERM, phases.interrupt)
    case = None
    try:
        sys.argv = [path]
        case, runner = make_case(load(path), class_name, method)
    except BaseException as error:
        phases.note(error, "making {}".format(class_name))
    if case is not None:
        try:
            runner(phases, case, class_name, method)
        except BaseException as error:
            phases.note(error, class_name)
        # From here on nothing of the block is left to be interrupted.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            write_whiteboard(case)
        except (OSError, millstream.Error) as error:
            phases.fail("the whiteboard cannot be written: {}".format(error))
    phases.finish()
    return EXIT_FAILED if phases.failed else 0


def leave(code):
    """Threads that nobody ended do not keep the block alive."""
    left = [thread.name for thread in threading.enumerate()
            if thread is not threading.current_thread() and not thread.daemon]
    if left:
        print("note: threads still ran after tearDown: " + ", ".join(left), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    # It lies in a directory of its own in the working directory of the block; a path of the host is absolute.
    WORK = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    FILE = os.path.join(WORK, sys.argv[1])
    DIRECTORY = os.path.dirname(FILE)
    sys.path[0] = DIRECTORY
    leave(main(FILE, sys.argv[2], sys.argv[3]))
