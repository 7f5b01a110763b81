//! What every block can be given: parameters, environment, limits, files.
