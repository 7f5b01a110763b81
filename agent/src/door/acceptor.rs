//! Accepts connections within bounds: handshakes, caps, pauses.
