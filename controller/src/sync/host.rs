//! Owns the board: feeds it, performs what it orders, answers those who wait.
