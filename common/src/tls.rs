//! PEM files to TLS configurations, identities and roles.
