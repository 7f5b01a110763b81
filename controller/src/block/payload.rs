//! Files and directories shipped by digest.
