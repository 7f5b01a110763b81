//! Life of one task: queued, staged, running(phase), ending, finished. Pure.
