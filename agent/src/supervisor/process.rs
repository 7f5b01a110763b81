//! Spawns, signals and reaps the processes of a task.
