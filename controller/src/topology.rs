//! Every defined stream with its host and addresses, as blocks see it.
