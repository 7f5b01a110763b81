//! The command line of the agent.
