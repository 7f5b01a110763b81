//! One session on one agent: connect, back off, resume, renew.
