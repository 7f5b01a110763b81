//! AgentService over sessions and their supervisors.
