//! Times of many hosts on the controller's clock. Pure.
