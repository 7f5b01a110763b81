//! A child of the test on this machine; nothing to install.
