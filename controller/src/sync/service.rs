//! SyncService over the board.
