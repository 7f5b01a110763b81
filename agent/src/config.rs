//! The agent's configuration file, and errors that name the line to change.
