//! Where each file of the results lies. Pure.
