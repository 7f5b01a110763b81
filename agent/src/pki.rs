//! A private certificate authority and short-lived certificates with roles.
