//! Frames between the door and a supervisor.
