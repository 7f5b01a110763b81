//! A process tree in a control group of version 2: born in it, ended by it.
