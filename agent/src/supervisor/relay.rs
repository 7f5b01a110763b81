//! Unix sockets of tasks, and the calls that blocks make on them, carried to the controller.
