//! What came of a task, with where and for whom: a complete value.
