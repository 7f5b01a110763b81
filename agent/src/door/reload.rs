//! Certificates that change while the agent runs.
