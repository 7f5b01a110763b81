//! Lets a test binary or an example be agent and payload.
