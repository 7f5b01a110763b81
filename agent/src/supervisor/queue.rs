//! FIFO of one stream as handed over by the controller. Pure.
