//! One stream's FIFO and the window of tasks handed over. Pure.
