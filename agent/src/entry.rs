//! How this program starts itself again in another role: supervisor, shim, child agent, in-block command.
