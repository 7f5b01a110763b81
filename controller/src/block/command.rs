//! Shell text, argument vectors, scripts and Python.
