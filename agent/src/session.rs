//! Leases, epochs, exclusivity: who may touch what. Pure.
