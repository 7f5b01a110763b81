//! TCP with mutual TLS.
