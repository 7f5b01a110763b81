//! Calls of blocks that arrive as frames on an agent's connection.
