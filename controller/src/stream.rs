//! One named place where blocks run, one after another.
