//! Facts about this host: name, kernel, addresses, capabilities, load.
